"""Schema, shape rule and cost of ``xf.match_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.match_tokens.reference import match_tokens

__all__ = ["OPERATOR"]


def _infer(
    keys: torch.Tensor,
    sizes: torch.Tensor | None = None,
    *,
    heads: int,
    prefix: int,
    r: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T = keys.shape[:2]
    torch._check(keys.shape[2] % heads == 0, lambda: "the heads do not divide the width of the keys")
    if isinstance(T, int):
        torch._check(0 <= r <= (T - prefix) // 2, lambda: f"of {T - prefix} tokens, {r} cannot find a partner")
    kept = keys.new_empty(B, T - r, dtype=torch.int64)
    return kept, keys.new_empty(B, r, dtype=torch.int64), keys.new_empty(B, r, dtype=torch.int64)


def _flops(keys: torch.Tensor, sizes: torch.Tensor | None = None, *, heads: int, prefix: int, **_: Any) -> Any:
    """The mean over heads, the norm, and the product of the two sets."""
    B, T, width = keys.shape
    head, free = width // heads, T - prefix
    pairs = (free - free // 2) * (free // 2)
    return B * T * width + 3 * B * T * head + 2 * B * pairs * head


OPERATOR = Operator(
    name="match_tokens",
    schema=("(Tensor keys, Tensor? sizes=None, *, int heads, int prefix, int r) -> (Tensor, Tensor, Tensor)"),
    reference=match_tokens,
    infer=_infer,
    flops=_flops,
)
