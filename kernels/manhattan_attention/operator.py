"""Schema, shape rule and cost of ``xf.manhattan_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.manhattan_attention.reference import manhattan_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    heads: int,
    rows: int,
    columns: int,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == rows * columns, lambda: "the tokens do not fill the grid of rows and columns")
    torch._check(k.shape[1] == rows * columns, lambda: "the keys do not fill the grid of rows and columns")
    torch._check(log_decay.shape[0] == heads, lambda: "there is not one decay for each head")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    rows: int,
    columns: int,
    decomposed: bool = False,
    **__: Any,
) -> Any:
    """Both products over all pairs, or over those of each row and of each column."""
    seen = rows + columns if decomposed else rows * columns
    return 2 * q.shape[0] * q.shape[1] * seen * (q.shape[2] + v.shape[2])


OPERATOR = Operator(
    name="manhattan_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor log_decay, *, int heads, float scale, int rows, int columns, "
        "bool decomposed=False) -> Tensor"
    ),
    reference=manhattan_attention,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
