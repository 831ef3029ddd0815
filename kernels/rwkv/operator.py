"""Schema, shape rule and cost of ``xf.rwkv``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.rwkv.reference import rwkv

__all__ = ["OPERATOR"]

# adding two sums: the larger peak, two exponentials of differences, and both weighted in values and in weights
_PLUS = 11


def _infer(k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, bonus: torch.Tensor, **_: Any) -> torch.Tensor:
    torch._check(k.shape[2] == v.shape[2], lambda: "k and v disagree on the channels")
    torch._check(log_decay.shape[0] == bonus.shape[0] == k.shape[2], lambda: "a channel has no decay or no bonus")
    return v.new_empty(v.shape)


def _flops(k: torch.Tensor, *_: Any, bidirectional: bool = False) -> Any:
    """Three additions of sums an element (in the chunk, what came before it, the token itself), aged, and a mean.

    In both directions two more in chunks and one of the directions.
    """
    return ((6 if bidirectional else 3) * (_PLUS + 1) + 1) * k.numel()


OPERATOR = Operator(
    name="rwkv",
    schema="(Tensor k, Tensor v, Tensor log_decay, Tensor bonus, *, bool bidirectional=False) -> Tensor",
    reference=rwkv,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
