"""Triton kernel of ``xf.gated_linear_attention``."""

from __future__ import annotations

import torch

from xformopt.kernels.retention.triton import chunk_for, refusal, states
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL"]

# tokens of a program: inside of them, gates are applied key by key
_TOKENS = 16
_PART = 128


def _accepts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gate: torch.Tensor, *, heads: int, scale: float = 1.0
) -> Verdict:
    return refusal(q, k, v, widths=(q.shape[2] // heads, v.shape[2] // heads))


def _plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gate: torch.Tensor, *, heads: int, scale: float = 1.0
) -> Plan:
    from xformopt.kernels.triton_recurrent import gated_outputs

    q, k, v, gate = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, log_gate))
    first, before, _ = states(k, v, gate, heads=heads, group=1, gated=True)
    (B, T), D, E = k.shape[:2], k.shape[2] // heads, v.shape[2] // heads
    out = v.new_empty(B, T, heads * E)
    M = min(_PART, power_of_two(E))
    named = (("q", q), ("k", k), ("v", v), ("gate", gate))
    arguments = {
        **{"q": q, "k": k, "v": v, "gate": gate, "states": before, "out": out},
        **{"T": T, "chunks": before.shape[2], "scale": scale},
        **{f"{name}_batch": x.stride(0) for name, x in named},
        **{f"{name}_row": x.stride(1) for name, x in named},
    }
    constants = {"HEADS": heads, "D": D, "E": E, "C": chunk_for(v.dtype), "B": _TOKENS, "WIDE": power_of_two(D), "M": M}
    second = Launch(gated_outputs, (tiles(T, _TOKENS) * tiles(E, M), heads, B), arguments, constants, 4, 1)
    return Plan((first, second), out, (before,))


KERNEL = Kernel(_plan, _accepts)
