"""Triton kernel of ``xf.delta_rule``, and the plan of the rule from any state."""

from __future__ import annotations

import torch

from xformopt.kernels.retention.triton import chunk_for, outputs, refusal
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL", "resumed"]

# channels that a system of a chunk is applied to at once
_PART = 64
# numbers of a state that one program holds
_HELD = 4096


def _accepts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, *, heads: int, scale: float = 1.0
) -> Verdict:
    return refusal(q, k, v, beta, widths=(q.shape[2] // heads, v.shape[2] // heads))


def _plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, *, heads: int, scale: float = 1.0
) -> Plan:
    return resumed(q, k, v, beta, None, heads=heads, scale=scale)


def resumed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    *,
    heads: int,
    scale: float,
) -> Plan:
    """Plan the rule from ``state``, ``[B, heads, D, E]``, and the state it leaves; None: from zeros, leaving none."""
    from xformopt.kernels.triton_delta import delta_states, delta_systems

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (B, T), D, E, C = k.shape[:2], k.shape[2] // heads, v.shape[2] // heads, chunk_for(k.dtype)
    chunks = tiles(T, C)
    keys, values = k.new_empty(B, T, heads * D), v.new_empty(B, T, heads * E)
    systems = Launch(
        delta_systems,
        (chunks, heads, B),
        {
            **{"k": k, "v": v, "beta": beta, "keys": keys, "values": values, "T": T},
            **{"k_batch": k.stride(0), "k_row": k.stride(1), "v_batch": v.stride(0), "v_row": v.stride(1)},
            **{"beta_batch": beta.stride(0), "beta_row": beta.stride(1), "beta_head": beta.stride(2)},
        },
        {"HEADS": heads, "D": D, "E": E, "C": C, "M": min(_PART, power_of_two(max(D, E)))},
        4,
        1,
    )
    before = k.new_empty(B, heads, chunks, D, E, dtype=torch.float32)
    left = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    M = min(power_of_two(E), max(16, _HELD // power_of_two(D)))
    states = Launch(
        delta_states,
        (tiles(E, M), heads, B),
        {
            **{"k": k, "keys": keys, "values": values, "states": before, "left": left},
            **{"given": None if state is None else state.contiguous(), "T": T, "chunks": chunks},
            **{"k_batch": k.stride(0), "k_row": k.stride(1)},
        },
        {"HEADS": heads, "D": D, "E": E, "C": C, "WIDE": power_of_two(D), "M": M},
        8 if k.dtype == torch.float32 else 4,
        2,
    )
    last, out = outputs(q, k, values, None, before, heads=heads, scale=scale)
    return Plan((systems, states, last), out if left is None else (out, left), (keys, values, before))


KERNEL = Kernel(_plan, _accepts)
