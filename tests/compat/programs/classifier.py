"""A classifier with one equilibrium layer, as programs for torchdeq 0.1.0 are written: options from the command line,
weights normed and reset in each step, and the loss at several states on the way.

    python classifier.py --steps 5 --n_states 3 --ift
"""

import argparse
import json

import torch
from torch import nn

from torchdeq import add_deq_args, apply_norm, get_deq, reset_norm
from torchdeq.loss import fp_correction


class Cell(nn.Module):
    """f of z and of the injected input u."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, z, u):
        return 0.4 * torch.tanh(self.outer(torch.relu(self.inner(z) + u))) + u


class Classifier(nn.Module):
    def __init__(self, args, features=4, width=16, classes=3):
        super().__init__()
        self.inject = nn.Linear(features, width)
        self.cell = Cell(width)
        self.head = nn.Linear(width, classes)
        apply_norm(self.cell, args=args)
        self.deq = get_deq(args)

    def forward(self, x, **kwargs):
        reset_norm(self.cell)
        u = self.inject(x)

        def func(z):
            return self.cell(z, u)

        z_out, info = self.deq(func, torch.zeros_like(u), **kwargs)
        return [self.head(z) for z in z_out], info


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--double", action="store_true")
    add_deq_args(parser)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    model = Classifier(args)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss()
    y = torch.arange(24) % 3
    x = torch.randn(24, 4) + 2 * nn.functional.one_hot(y, 4)

    losses, errors = [], []
    for _ in range(args.steps):
        logits, info = model(x)
        loss = fp_correction(criterion, (logits, y), gamma=args.gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        errors.append(info["abs_lowest"].mean().item())

    model.eval()
    model.deq.eval_f_max_iter = 2 * model.deq.f_max_iter
    with torch.no_grad():
        logits, info = model(x, sradius_mode=args.sradius_mode)
        losses.append(criterion(logits[-1], y).item())
        errors.append(info["abs_lowest"].mean().item())
    return {
        "losses": losses,
        "residuals": errors,
        "states": len(logits),
        "nstep": info["nstep"].mean().item(),
        "norms": {name: p.norm().item() for name, p in model.state_dict().items()},
    }


if __name__ == "__main__":
    print(json.dumps(main()))
