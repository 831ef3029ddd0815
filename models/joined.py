"""Blocks of parallel branches that are joined, step by step in training, at the inputs of their nonlinearities.

Zhou, Chaudhary and Datta, "Rethinking Vision Transformer Depth via Structural Reparameterization", arXiv 2511.19718.
The norm stands in front of all branches.  With ``lambda`` the share to which they are joined, and ``f`` a nonlinearity,

    u_i = (1 - lambda) W1_i x + lambda sum_k W1_k x,    y = sum_i W2_i f(u_i).

At 0 the branches are as free as those of ParallelViT.  At 1 all nonlinearities see the same value, so that the block
is a single branch with ``W1 = sum W1_i`` and ``W2 = sum W2_i``, exactly: the pass ``merge-branches`` adds the matrices.
Of an attention, queries, keys and values are joined alike in front of the softmax, head by head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.blocks import merge_heads, split_heads

__all__ = ["JoinedAttention", "JoinedBlock", "JoinedMlp", "join_branches"]


class Joined(nn.Module):
    """What joins: ``joined`` is lambda, 1 unless training says otherwise."""

    joined: float = 1.0

    def blend(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return what each branch's nonlinearity gets; a single value where all get the same."""
        total = torch.stack(list(values)).sum(0)
        if self.joined == 1:
            return [total]
        return [(1 - self.joined) * value + self.joined * total for value in values]


def join_branches(model: nn.Module, share: float) -> None:
    """Set lambda in every block of ``model``."""
    for module in model.modules():
        if isinstance(module, Joined):
            module.joined = share


class JoinedMlp(Joined):
    """Branches of widen, activate, narrow."""

    def __init__(self, width: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.widen = nn.ModuleList(nn.Linear(width, hidden) for _ in range(branches))
        self.narrow = nn.ModuleList(nn.Linear(hidden, width) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape, each token by itself."""
        hidden = [functional.gelu(u) for u in self.blend([widen(x) for widen in self.widen])]
        return _leave(self.narrow, hidden)


class JoinedAttention(Joined):
    """Branches of multi-head self-attention."""

    def __init__(self, width: int, heads: int, branches: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(branches)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        q, k, v = (self.blend([linear(x) for linear in kind]) for kind in (self.query, self.key, self.value))
        attended = [self._attend(*parts) for parts in zip(q, k, v, strict=True)]
        return _leave(self.output, attended)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))  # [B, H, T, D]
        return merge_heads(functional.scaled_dot_product_attention(q, k, v))


class JoinedBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, each of several branches behind one norm."""

    def __init__(self, width: int, heads: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), JoinedAttention(width, heads, branches)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), JoinedMlp(width, hidden, branches)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


def _leave(linears: nn.ModuleList, hidden: Sequence[Tensor]) -> Tensor:
    """Sum what the last layer of every branch makes of its own hidden value, or of the one they share."""
    own = hidden if len(hidden) > 1 else [hidden[0]] * len(linears)
    return torch.stack([linear(value) for linear, value in zip(linears, own, strict=True)]).sum(0)
