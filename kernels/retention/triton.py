"""Triton kernel of ``xf.retention``, and the plan of every recurrence with one decay a token and head."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL", "MOST_WIDTH", "chunk_for", "decayed", "outputs", "refusal", "states"]

# of a key or a value
MOST_WIDTH = 256
# channels of a value, and of a key in a state, that one program takes
_PART = 64


def chunk_for(dtype: torch.dtype) -> int:
    """Return how many tokens are computed together; of float32 as many as the registers of sm_80 hold."""
    return 32 if dtype == torch.float32 else 64


def refusal(*operands: torch.Tensor, widths: tuple[Any, ...]) -> Verdict:
    """Say what a recurrent kernel does not take: operands of several dtypes, and keys or values of such widths."""
    if operands[0].dtype not in FLOATS or any(x.dtype != operands[0].dtype for x in operands):
        return f"its operands are in {', '.join(str(x.dtype) for x in operands)}, not in one floating dtype"
    for width in widths:
        if not isinstance(width, int):
            return "the width of its heads is not fixed"
        if width > MOST_WIDTH:
            return f"its heads are {width} wide, more than {MOST_WIDTH}"
    return None


def states(
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    *,
    heads: int,
    group: int,
    gated: bool,
    has_sums: bool = False,
) -> tuple[Launch, torch.Tensor, torch.Tensor | None]:
    """Plan the states before each chunk, and the sums of keys: ``k``, ``v`` with adjacent channels.

    ``decay`` is ``[B, T, heads]`` in any layout, or gated, like ``k``.
    """
    from xformopt.kernels.triton_recurrent import chunk_states

    (B, T), D, E = k.shape[:2], k.shape[2] * group // heads, v.shape[2] // heads
    C = chunk_for(k.dtype)
    chunks = tiles(T, C)
    written = k.new_empty(B, heads, chunks, D, E, dtype=torch.float32)
    sums = k.new_empty(B, heads, chunks, D, dtype=torch.float32) if has_sums else None
    N, M = min(_PART, power_of_two(D)), min(_PART, power_of_two(E))
    arguments = {
        **{"k": k, "v": v, "decay": decay, "states": written, "sums": sums, "T": T, "chunks": chunks},
        **{"k_batch": k.stride(0), "k_row": k.stride(1), "v_batch": v.stride(0), "v_row": v.stride(1)},
        **_strides_of(decay, D if gated else None),
    }
    constants = {"GROUP": group, "D": D, "E": E, "GATED": gated, "C": C, "N": N, "M": M}
    return Launch(chunk_states, (tiles(D, N) * tiles(E, M), heads, B), arguments, constants, 4, 2), written, sums


def decayed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    *,
    heads: int,
    group: int = 1,
    scale: float = 1.0,
    eps: float | None = None,
    added: torch.Tensor | None = None,
    rate: torch.Tensor | None = None,
) -> Plan:
    """Plan ``o_i = scale sum_{j <= i} exp(sum_{j < l <= i} decay_l) (q_i . k_j) v_j``.

    Args:
        q: ``[B, T, heads / group * D]``.
        k: As ``q``.
        v: ``[B, T, heads * E]``.
        decay: Log decays, ``[B, T, heads]``; None: nothing decays.
        heads: Heads of the values.
        group: Adjacent heads that share queries and keys.
        scale: Factor of the products.
        eps: Where given, outputs are divided by the sum of their weights and this.
        added: Added to the outputs, times ``rate``: ``[B, T, heads * E]``, adjacent channels.
        rate: ``[heads]``, contiguous.

    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    first, before, sums = states(k, v, decay, heads=heads, group=group, gated=False, has_sums=eps is not None)
    second, out = outputs(
        q, k, v, decay, before, sums, heads=heads, group=group, scale=scale, eps=eps, added=added, rate=rate
    )
    return Plan((first, second), out, (before,) if sums is None else (before, sums))


def outputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    before: torch.Tensor,
    sums: torch.Tensor | None = None,
    *,
    heads: int,
    group: int = 1,
    scale: float = 1.0,
    eps: float | None = None,
    added: torch.Tensor | None = None,
    rate: torch.Tensor | None = None,
) -> tuple[Launch, torch.Tensor]:
    """Plan the outputs of :func:`decayed` from the state ``before`` each chunk; operands with adjacent channels."""
    from xformopt.kernels.triton_recurrent import decayed_outputs

    (B, T), D, E = k.shape[:2], k.shape[2] * group // heads, v.shape[2] // heads
    out = v.new_empty(B, T, heads * E)
    M = min(_PART, power_of_two(E))
    arguments = {
        **{"q": q, "k": k, "v": v, "decay": decay, "states": before, "sums": sums, "out": out},
        **{"T": T, "chunks": before.shape[2], "scale": scale, "eps": eps or 0.0, "added": added, "rate": rate},
        "added_batch": 0 if added is None else added.stride(0),
        "added_row": 0 if added is None else added.stride(1),
        **{f"{name}_batch": x.stride(0) for name, x in (("q", q), ("k", k), ("v", v))},
        **{f"{name}_row": x.stride(1) for name, x in (("q", q), ("k", k), ("v", v))},
        **_strides_of(decay, None),
    }
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "D": D,
        "E": E,
        "C": chunk_for(v.dtype),
        "WIDE": power_of_two(D),
        "M": M,
    }
    second = Launch(decayed_outputs, (before.shape[2] * tiles(E, M), heads, B), arguments, constants, 4, 1)
    return second, out


def _strides_of(decay: torch.Tensor | None, head: int | None) -> dict[str, Any]:
    """Return the strides of log decays; a head of gates begins ``head`` channels after the one before."""
    if decay is None:
        return {"decay_batch": 0, "decay_row": 0, "decay_head": 0}
    batch, row, channel = decay.stride()
    return {"decay_batch": batch, "decay_row": row, "decay_head": channel if head is None else head}


def _plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, *, heads: int, scale: float = 1.0
) -> Plan:
    return decayed(q, k, v, log_decay.expand(q.shape[0], q.shape[1], heads), heads=heads, scale=scale)


def _accepts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, *, heads: int, scale: float = 1.0
) -> Verdict:
    return refusal(q, k, v, widths=(q.shape[2] // heads, v.shape[2] // heads))


KERNEL = Kernel(_plan, _accepts)
