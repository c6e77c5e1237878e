"""Two resolutions of one picture that find their equilibrium together: a state of several tensors, as programs for
torchdeq 0.1.0 have it.

    python multiscale.py --steps 5 --f_solver broyden --hook_ift
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import nn

from torchdeq import get_deq
from torchdeq.norm import apply_norm, remove_norm, reset_norm
from torchdeq.utils import add_deq_args


class Stage(nn.Module):
    """One pass of both branches, and what they hand to each other."""

    def __init__(self, fine=3, coarse=5):
        super().__init__()
        self.fine = nn.Conv2d(fine, fine, 3, padding=1)
        self.coarse = nn.Conv2d(coarse, coarse, 3, padding=1)
        self.fuse_down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.fuse_up = nn.ConvTranspose2d(coarse, fine, 2, stride=2)

    def forward(self, states, injection):
        fine, coarse = states
        new_fine = torch.tanh(0.4 * self.fine(fine) + 0.3 * self.fuse_up(coarse) + injection[0])
        new_coarse = torch.tanh(0.4 * self.coarse(coarse) + 0.3 * self.fuse_down(fine) + injection[1])
        return [new_fine, new_coarse]


class Net(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.stage = Stage()
        self.head = nn.Linear(8, 2)
        apply_norm(self.stage, args=args, filter_out="fuse")
        self.deq = get_deq(args)

    def forward(self, x, writer=None):
        fine = self.stem(x)
        injection = [fine, torch.zeros(len(x), 5, 4, 4)]
        reset_norm(self.stage)

        def func(*states):
            return self.stage(states, injection)

        z_init = [torch.zeros_like(part) for part in injection]
        z_out, info = self.deq(func, z_init, solver_kwargs={"tau": self.args.tau}, writer=writer)
        pooled = [torch.cat([F.adaptive_avg_pool2d(part, 1).flatten(1) for part in z], dim=1) for z in z_out]
        return [self.head(p) for p in pooled], info


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--double", action="store_true")
    add_deq_args(parser)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    model = Net(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 2

    losses, errors, backward = [], [], []
    for _ in range(args.steps):
        logits, info = model(x, writer=backward.append)
        loss = F.cross_entropy(logits[-1], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        errors.append(info["rel_lowest"].mean().item())

    model.eval()
    with torch.no_grad():
        reset_norm(model.stage)
        before = model(x)[0][-1]
        remove_norm(model.stage)
        losses.append((model(x)[0][-1] - before).abs().max().item())
    return {
        "losses": losses,
        "residuals": errors,
        "states": len(logits),
        "nstep": info["nstep"].mean().item(),
        "norms": {name: p.norm().item() for name, p in model.state_dict().items()},
    }


if __name__ == "__main__":
    print(json.dumps(main()))
