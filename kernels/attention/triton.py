"""Triton kernel of ``xf.attention``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL", "MOST_WIDTH", "Tile", "forward", "refusal", "tile_for"]

# of a head, so that a block of queries and two of keys and values fit the shared memory of sm_80
MOST_WIDTH = 256


class Tile(NamedTuple):
    """A block of ``M`` queries and ``N`` keys, its warps, and how many blocks of keys are on their way at once."""

    M: int
    N: int
    warps: int
    stages: int


def tile_for(width: int, dtype: torch.dtype) -> Tile:
    """Return the default block for a head of ``width``; never by length, which differs from call to call."""
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2) if width <= 64 else Tile(32, 32, 4, 2)
    if width <= 64:
        return Tile(128, 64, 4, 3)
    return Tile(128, 64, 8, 2) if width <= 128 else Tile(64, 32, 8, 2)


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kv_heads: int) -> Verdict:
    """Say what of queries, keys and values an attention kernel does not take."""
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"it is in {q.dtype}, {k.dtype} and {v.dtype}, not in one of float32, float16 and bfloat16"
    width: Any = max(q.shape[2] // heads, v.shape[2] // kv_heads)
    if not isinstance(width, int):
        return "the width of its heads is not fixed"
    if width > MOST_WIDTH:
        return f"its heads are {width} wide, more than {MOST_WIDTH}"
    return None


def _accepts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any
) -> Verdict:
    return refusal(q, k, v, heads, kv_heads)


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_log_size: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> Plan:
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    return forward(
        q,
        k,
        v,
        {
            "key_mask": None if key_mask is None else key_mask.expand(B, S).contiguous(),
            "bias": None if bias is None else bias.expand(B, heads, T, S),
            "log_size": None if key_log_size is None else key_log_size.expand(B, S).contiguous(),
        },
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
        left=window_left,
        right=0 if causal else window_right,
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: dict[str, torch.Tensor | None],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    left: int,
    right: int,
) -> Plan:
    """Plan the shared kernel; packed where ``operands`` has ``offsets``. Windows are those of the kernel."""
    from xformopt.kernels.triton_attention import attention_forward

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    D, E = q.shape[2] // heads, v.shape[2] // kv_heads
    tile = tile_for(max(D, E), q.dtype)
    (B, T), S = q.shape[:2], k.shape[1]
    out = q.new_empty(B, T, heads * E)
    offsets, bias = operands.get("offsets"), operands.get("bias")
    # each sequence may leave a part of its last block empty
    sequences = 1 if offsets is None else offsets.shape[0] - 1
    grid = (tiles(T, tile.M), heads, B) if offsets is None else (tiles(T, tile.M) + sequences, heads)
    names = ("bias_batch", "bias_head", "bias_row", "bias_column")
    arguments = {
        **{"q": q, "k": k, "v": v, "out": out},
        **{name: operands.get(name) for name in ("key_mask", "bias", "log_size", "offsets", "keys")},
        **{"T": T, "S": S, "sequences": sequences, "scale": scale},
        **{f"{name}_batch": x.stride(0) for name, x in (("q", q), ("k", k), ("v", v))},
        **{f"{name}_row": x.stride(1) for name, x in (("q", q), ("k", k), ("v", v))},
        **dict(zip(names, (0, 0, 0, 0) if bias is None else bias.stride(), strict=True)),
    }
    constants = {
        **{"HEADS": heads, "GROUP": heads // kv_heads, "D": D, "E": E, "LEFT": left, "RIGHT": right},
        **{"PACKED": offsets is not None, "M": tile.M, "N": tile.N},
        **{"WIDE_D": power_of_two(D), "WIDE_E": power_of_two(E)},
    }
    return Plan((Launch(attention_forward, grid, arguments, constants, tile.warps, tile.stages),), out)


KERNEL = Kernel(_plan, _accepts)
