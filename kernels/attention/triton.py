"""Triton kernel of ``xf.attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import (
    FLOATS,
    Kernel,
    Launch,
    Plan,
    Tile,
    Trial,
    Verdict,
    power_of_two,
    room_for,
    tile_of,
    tiles,
)

__all__ = ["KERNEL", "MOST_WIDTH", "decode", "forward", "refusal", "strides_of", "trial"]

# of a head, so that a block of queries and two of keys and values fit the shared memory of sm_80
MOST_WIDTH = 256
# queries of all heads that share keys: what one step of tensor cores takes
_FEW = 16
# keys of a program where queries are few
_KEYS = 512


# what tiles are timed on: sequences, tokens of each, heads
_TIMED = (2, 2048, 16)


def _tiles_for(width: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return the blocks for a head of ``width``, the default first; never by length, which differs between calls."""
    if dtype == torch.float32:
        if width <= 64:
            return Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)
        return Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 4, 2)
    if width <= 64:
        return Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 4, 4)
    if width <= 128:
        return Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3), Tile(128, 32, 4, 3)
    return Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 4, 2)


def _key(dtype: torch.dtype, D: int, E: int) -> str:
    return f"attention in {dtype}, heads of {D} and {E}"


def trial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any) -> Trial:
    """Return the choice of blocks of the shared kernel."""
    dtype, D, E = q.dtype, q.shape[2] // heads, v.shape[2] // kv_heads

    def operands(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        B, T, H = _TIMED
        drawn = (torch.randn(B, T, H * width, device=device).to(dtype) for width in (D, D, E))
        return tuple(drawn), {"heads": H, "kv_heads": H, "scale": D**-0.5}

    return Trial(_key(dtype, D, E), _tiles_for(max(D, E), dtype), operands)


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
    operands = {
        "key_mask": None if key_mask is None else key_mask.expand(B, S).contiguous(),
        "bias": None if bias is None else bias.expand(B, heads, T, S),
        "log_size": None if key_log_size is None else key_log_size.expand(B, S).contiguous(),
    }
    right = 0 if causal else window_right
    # few queries of a fixed number, as when tokens are generated one by one: there is more to share out in the keys
    plan = decode if isinstance(T, int) and T * (heads // kv_heads) <= _FEW else forward
    return plan(q, k, v, operands, heads=heads, kv_heads=kv_heads, scale=scale, left=window_left, right=right)


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
    tile = tile_of(_key(q.dtype, D, E), _tiles_for(max(D, E), q.dtype)[0])
    (B, T), S = q.shape[:2], k.shape[1]
    out, result = room_for(q, B, T, heads * E)
    offsets, bias = operands.get("offsets"), operands.get("bias")
    # each sequence may leave a part of its last block empty
    sequences = 1 if offsets is None else offsets.shape[0] - 1
    grid = (tiles(T, tile.M), heads, B) if offsets is None else (tiles(T, tile.M) + sequences, heads)
    arguments = {
        **{"q": q, "k": k, "v": v, "out": out},
        **{name: operands.get(name) for name in ("key_mask", "bias", "log_size", "offsets", "keys")},
        **{"T": T, "S": S, "sequences": sequences, "scale": scale},
        **strides_of(q, k, v, bias),
    }
    constants = {
        **{"HEADS": heads, "GROUP": heads // kv_heads, "D": D, "E": E, "LEFT": left, "RIGHT": right},
        **{"PACKED": offsets is not None, "M": tile.M, "N": tile.N},
        **{"WIDE_D": power_of_two(D), "WIDE_E": power_of_two(E)},
    }
    return Plan((Launch(attention_forward, grid, arguments, constants, tile.warps, tile.stages),), result)


def decode(
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
    """Plan attention of few queries: parts of the keys apart, then put together (FlashDecoding)."""
    from xformopt.kernels.triton_attention import decode_join, decode_split

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    D, E = q.shape[2] // heads, v.shape[2] // kv_heads
    (B, T), S = q.shape[:2], k.shape[1]
    parts = tiles(S, _KEYS)
    out = q.new_empty(B, T, heads * E)
    sums = q.new_empty(B, parts, heads, T, E, dtype=torch.float32)
    totals = q.new_empty(B, parts, heads, T, 2, dtype=torch.float32)
    bias = operands["bias"]
    widths = {"D": D, "WIDE_D": power_of_two(D), "N": 64 if max(D, E) <= 128 and q.dtype != torch.float32 else 32}
    shared = {"T": T, "HEADS": heads, "E": E, "WIDE_E": power_of_two(E)}
    split = Launch(
        decode_split,
        (parts, kv_heads, B),
        {**{"q": q, "k": k, "v": v, "sums": sums, "totals": totals}, **operands, "S": S, "scale": scale}
        | strides_of(q, k, v, bias),
        {**shared, **widths, "GROUP": heads // kv_heads, "LEFT": left, "RIGHT": right, "KEYS": _KEYS, "M": _FEW},
        4,
        3,
    )
    arguments = {"sums": sums, "totals": totals, "out": out, "parts": parts}
    join = Launch(decode_join, (T, heads, B), arguments, {**shared, "HAS_BIAS": bias is not None}, 4, 2)
    return Plan((split, join), out, (sums, totals))


def strides_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
    """Return the strides that the kernels take."""
    names = ("bias_batch", "bias_head", "bias_row", "bias_column")
    return {
        **{f"{name}_batch": x.stride(0) for name, x in (("q", q), ("k", k), ("v", v))},
        **{f"{name}_row": x.stride(1) for name, x in (("q", q), ("k", k), ("v", v))},
        **dict(zip(names, (0, 0, 0, 0) if bias is None else bias.stride(), strict=True)),
    }


KERNEL = Kernel(_plan, _accepts, trial)
