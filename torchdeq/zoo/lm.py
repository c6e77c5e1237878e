"""A causal transformer of one weight-tied block, as deep as its equilibrium: the DEQ-Transformer, made small.

    z = f(z, x),   x = embed(tokens) + places,
    q, k, v = W z + U x,   h = norm(z + V x + O attention(q, k, v)),   f(z, x) = norm(h + B relu(A h + a) + b),
    logits = E z + e.

A state is a whole sequence, (T, width). Attention looks at earlier places only, so z at a place does not depend on
what comes after it, at the equilibrium no less than in a stack of blocks. U x and V x are worked out once for a solve.

Source: Bai, Kolter and Koltun (2019), arXiv 1909.01377, section 4.2. Departures: V x is added to what goes around
attention as well; without it every layer normalisation lets z through nearly as it is, and a solve takes five times
the evaluations. Places are learned vectors, rather than relative ones with a memory of the segment before; weights are
not normalised and nothing is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from torchdeq import DEQ, GMRES, IFT, Broyden, Solution


class CausalBlock(nn.Module):
    """f of the equilibrium, and the layer of a stack: attention to what was, then a network for each place.

    Arguments:
        width: channels, a multiple of `heads`.
        heads: of the attention.

    Raises:
        ValueError: `width` is no positive multiple of `heads`.

    Example:
        >>> block, x = CausalBlock(8, heads=2), torch.randn(3, 5, 8)
        >>> block(torch.zeros_like(x), block.inject(x)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, *, heads: int = 4):
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(
                f"CausalBlock({width!r}, heads={heads!r}): expected a width that is a positive multiple of heads, and "
                f"one head or more."
            )
        self.heads = heads
        self.inject = nn.Linear(width, 4 * width)  # U and V, with the biases of W and O
        self.attend = nn.Linear(width, 3 * width, bias=False)  # W
        self.join = nn.Linear(width, width, bias=False)  # O
        self.norm = nn.LayerNorm(width)
        self.inside = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        """f(z, x) of z (B, T, width), with `inject(x)` (B, T, 4 width)."""
        to_qkv, to_h = injected.split((3 * z.shape[-1], z.shape[-1]), dim=-1)
        qkv = (self.attend(z) + to_qkv).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, width / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads) each
        seen = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = self.norm(z + to_h + self.join(seen))
        return self.norm_out(h + self.inside(h))


class EquilibriumLM(nn.Module):
    """Predicts the next token at each place of (B, T) tokens, from the equilibrium of one causal block.

    Arguments:
        vocab: how many tokens there are, at least 2.
        length: the longest T.
        deq: the equilibrium layer. None: Broyden's method and implicit differentiation as in the paper, to relative
            1e-2, with no more than 24 evaluations and products with Jᵀ.
        width: channels of the state, a multiple of `heads`.
        heads: of the attention.

    Raises:
        ValueError: an argument is out of its range, or a sequence is longer than `length`.

    Example:
        >>> model = EquilibriumLM(10, 16, width=16)
        >>> logits, solution = model(torch.randint(10, (2, 16)))
        >>> logits.shape, bool((solution.residual < 0.1).all())
        (torch.Size([2, 16, 10]), True)
    """

    def __init__(self, vocab: int, length: int, deq: DEQ | None = None, *, width: int = 32, heads: int = 4):
        super().__init__()
        if vocab < 2 or length < 1:
            raise ValueError(
                f"EquilibriumLM(vocab={vocab!r}, length={length!r}): expected two tokens or more and a length of at "
                f"least 1."
            )
        self.deq = deq or DEQ(
            Broyden(tol=1e-2, stop_mode="rel", max_iter=24), IFT(solver=GMRES(tol=1e-2, max_iter=24))
        )
        self.embed = nn.Embedding(vocab, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.block = CausalBlock(width, heads=heads)
        self.head = nn.Linear(width, vocab)

    def inject(self, tokens: Tensor) -> Tensor:
        """U x (B, T, 4 width) of tokens (B, T): all that the block sees of them."""
        if tokens.shape[1] > len(self.places):
            raise ValueError(
                f"EquilibriumLM: got sequences of {tokens.shape[1]} tokens, expected at most length="
                f"{len(self.places)}. Cut them, or make the model longer."
            )
        return self.block.inject(self.embed(tokens) + self.places[: tokens.shape[1]])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Solution]:
        """The logits (B, T, vocab) of the next tokens after tokens (B, T), and the `Solution` of the solve."""
        injected = self.inject(tokens)  # once, not in every evaluation
        start = injected.new_zeros(*tokens.shape, self.embed.embedding_dim)
        z, solution = self.deq(lambda z: self.block(z, injected), start)
        return self.head(z), solution
