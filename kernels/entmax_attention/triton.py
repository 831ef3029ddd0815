"""Triton kernel of ``xf.entmax_attention``."""

from __future__ import annotations

import torch

from xformopt.kernels.attention.triton import refusal
from xformopt.kernels.entmax_attention.reference import steps
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL"]

# queries and keys of a block: the smaller, the more blocks have no weight
_ROWS, _COLUMNS = 64, 64


def _accepts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    alpha: float = 1.5,
    causal: bool = False,
) -> Verdict:
    return refusal(q, k, v, heads, heads)


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    alpha: float = 1.5,
    causal: bool = False,
) -> Plan:
    from xformopt.kernels.triton_entmax import entmax_forward

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (B, T), S, D, E = q.shape[:2], k.shape[1], q.shape[2] // heads, v.shape[2] // heads
    is_large = q.dtype == torch.float32 or max(D, E) > 128
    M, N = _ROWS, _COLUMNS // 2 if is_large else _COLUMNS
    rows, columns = tiles(T, M), tiles(S, N)
    blocks = q.new_empty(B, heads, rows, columns, dtype=torch.int32)
    out = q.new_empty(B, T, heads * E)
    arguments = {
        **{"q": q, "k": k, "v": v, "blocks": blocks, "out": out},
        "key_mask": None if key_mask is None else key_mask.expand(B, S).contiguous(),
        **{"T": T, "S": S, "columns": columns, "scale": scale * (alpha - 1)},
        **{f"{name}_batch": x.stride(0) for name, x in (("q", q), ("k", k), ("v", v))},
        **{f"{name}_row": x.stride(1) for name, x in (("q", q), ("k", k), ("v", v))},
    }
    constants = {
        **{"HEADS": heads, "D": D, "E": E, "CAUSAL": causal, "POWER": 1 / (alpha - 1), "STEPS": steps(alpha)},
        **{"M": M, "N": N, "WIDE_D": power_of_two(D), "WIDE_E": power_of_two(E)},
    }
    launch = Launch(entmax_forward, (rows, heads, B), arguments, constants, 8 if is_large else 4, 2)
    return Plan((launch,), out, (blocks,))


KERNEL = Kernel(_plan, _accepts)
