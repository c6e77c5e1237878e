"""A transformer block at its equilibrium over a sequence of tokens, as programs for torchdeq 0.1.0 have it: dropout
whose masks last for a solve, and a term in the loss that keeps the Jacobian small.

    python sequence.py --steps 5 --jac_loss_weight 0.5 --jac_loss_freq 1
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import nn

from torchdeq import add_deq_args, apply_norm, get_deq, reset_deq
from torchdeq.dropout import VariationalDropout, VariationalDropout1d, VariationalDropToken1d
from torchdeq.loss import fp_correction, jac_reg
from torchdeq.solver import solver_stat_from_final_step


class Block(nn.Module):
    """Causal attention, a layer of two, and what is injected: (B, L, D) to (B, L, D)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.attend = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop_channel = VariationalDropout1d(dropout)
        self.drop_token = VariationalDropToken1d(dropout)
        self.drop_inner = VariationalDropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, z, u, mask):
        q, k, v = self.attend(self.drop_channel(z)).chunk(3, dim=-1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask, float("-inf"))
        heard = self.drop_token(scores.softmax(-1) @ v)
        thought = self.down(self.drop_inner(torch.relu(self.up(z))))
        return self.norm(0.3 * heard + 0.3 * thought + u)


class LanguageModel(nn.Module):
    def __init__(self, args, tokens=7, width=12):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(tokens, width)
        self.block = Block(width, args.dropout)
        self.head = nn.Linear(width, tokens)
        self.head.weight = self.embed.weight
        apply_norm(self.block, args=args)
        self.deq = get_deq(args)

    def forward(self, data, target, jac=False):
        reset_deq(self)
        u = self.embed(data)
        length = data.shape[1]
        mask = torch.triu(torch.ones(length, length), diagonal=1) > 0

        def func(z):
            return self.block(z, u, mask)

        z_out, info = self.deq(func, torch.zeros_like(u))
        z = z_out[-1]
        penalty = jac_reg(func(z), z) if jac and self.training else torch.zeros(())
        with torch.no_grad():
            last = solver_stat_from_final_step(z, func(z), self.args.grad[-1])
        logits = [self.head(state).flatten(0, 1) for state in z_out]
        loss = fp_correction(
            F.cross_entropy, (logits, target.flatten()), weight_func="linear", gamma=self.args.gamma
        )
        return loss, penalty, info, last


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.2)
    add_deq_args(parser)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    model = LanguageModel(args)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data = torch.randint(7, (3, 6))
    target = data.roll(-1, dims=1)

    losses, errors = [], []
    for _ in range(args.steps):
        jac = torch.rand(()).item() < args.jac_loss_freq
        loss, penalty, info, last = model(data, target, jac)
        optimizer.zero_grad()
        (loss + args.jac_loss_weight * penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses += [loss.item(), penalty.item()]
        errors.append(last["abs_lowest"].mean().item())

    model.eval()
    with torch.no_grad():
        losses.append(model(data, target)[0].item())
    return {
        "losses": losses,
        "residuals": errors,
        "states": len(model.deq.indexing),
        "nstep": info["nstep"].mean().item(),
        "norms": {name: p.norm().item() for name, p in model.state_dict().items()},
    }


if __name__ == "__main__":
    print(json.dumps(main()))
