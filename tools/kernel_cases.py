"""The operands each Triton kernel is compiled for when its resources are recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["CASES", "Case", "operands_of"]

HALF, SINGLE = torch.bfloat16, torch.float32
NAMES = {HALF: "bf16", SINGLE: "fp32"}


@dataclass(frozen=True)
class Case:
    """One call of an operator: tensors as ``(shape, dtype)``, by place and by name, and plain options."""

    operator: str
    name: str
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


def operands_of(case: Case) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments, tensors on the device ``meta``."""
    made = [_made(value) for value in case.operands]
    return made, {name: _made(value) for name, value in case.options.items()}


def _made(value: Any) -> Any:
    return torch.empty(value[0], dtype=value[1], device="meta") if isinstance(value, tuple) else value


def _attention(name: str, dtype: torch.dtype, width: int, *operands: Any, group: int = 1, **options: Any) -> Case:
    """Attention of 12 heads in 4 sequences of 512 tokens."""
    kv_heads = 12 // group
    q, kv = ((4, 512, 12 * width), dtype), ((4, 512, kv_heads * width), dtype)
    given = {"heads": 12, "kv_heads": kv_heads, "scale": width**-0.5, **options}
    return Case("attention", f"{name}, {NAMES[dtype]}, {width} wide", (q, kv, kv, *operands), given)


def _packed(dtype: torch.dtype, width: int, *, has_keys: bool = False, causal: bool = False) -> Case:
    tokens, number = ((1, 2048, 12 * width), dtype), torch.int64
    options = {"heads": 12, "kv_heads": 12, "scale": width**-0.5, "causal": causal}
    keys = ((4,), number) if has_keys else None
    name = f"{'causal, ' if causal else ''}{'keys, ' if has_keys else ''}{NAMES[dtype]}, {width} wide"
    return Case("attention_packed", name, (tokens, tokens, tokens, ((5,), number), keys), options)


_MASK = ((4, 512), torch.bool)
_BIAS = ((4, 12, 512, 512), HALF)


def _decode(name: str, dtype: torch.dtype, width: int, *operands: Any, kv_heads: int) -> Case:
    """One query of 16 heads in 4 sequences with 4,096 keys in the cache."""
    q, kv = ((4, 1, 16 * width), dtype), ((4, 4096, kv_heads * width), dtype)
    options = {"heads": 16, "kv_heads": kv_heads, "scale": width**-0.5, "causal": True}
    return Case("attention", f"one query, {name}, {NAMES[dtype]}, {width} wide", (q, kv, kv, *operands), options)


_ATTENTION = (
    _attention("all keys", HALF, 64),
    _attention("all keys", HALF, 128),
    _attention("all keys", SINGLE, 64),
    _attention("causal", HALF, 64, causal=True),
    _attention("causal, groups", HALF, 128, causal=True, group=4),
    _attention("causal window", HALF, 64, causal=True, window_left=256),
    _attention("key mask, bias and sizes", HALF, 64, _MASK, _BIAS, ((4, 512), HALF)),
    _decode("groups", HALF, 128, kv_heads=4),
    _decode("key mask", HALF, 64, ((4, 4096), torch.bool), kv_heads=16),
    _decode("groups", SINGLE, 128, kv_heads=4),
    _packed(HALF, 64, has_keys=True),
    _packed(HALF, 128, causal=True),
)

_X, _SINGLE = ((4, 512, 768), HALF), ((4, 512, 768), SINGLE)
_SPARSE = Case(
    "block_sparse_attention",
    "blocks of 64, causal, bf16, 64 wide",
    (_X, _X, _X, ((1, 8, 8), torch.bool)),
    {"heads": 12, "scale": 0.125, "block": 64, "causal": True},
)
_ENTMAX = (
    Case("entmax_attention", "causal, bf16, 64 wide", (_X, _X, _X), {"heads": 12, "scale": 0.125, "causal": True}),
    Case("entmax_attention", "key mask, bf16, 128 wide", (_X, _X, _X, _MASK), {"heads": 6, "scale": 0.0884}),
    Case("entmax_attention", "fp32, alpha 1.25, 64 wide", (_SINGLE,) * 3, {"heads": 12, "scale": 0.125, "alpha": 1.25}),
)
_WEIGHT = ((768,), HALF)
_INDEX = torch.int64
_ANGLES = ((1, 512, 32), HALF)
_ROWS = (
    Case("layer_norm", "bf16, 768 wide", (_X, _WEIGHT, _WEIGHT), {"eps": 1e-5}),
    Case("rms_norm", "bf16, 4096 wide", (((4, 512, 4096), HALF), ((4096,), HALF)), {"eps": 1e-5}),
    Case("rms_norm", "bf16, over heads of 64", (_X, ((64,), HALF)), {"eps": 1e-5, "groups": 12}),
    Case("add_layer_norm", "bf16, 768 wide", (_X, _X, _WEIGHT, _WEIGHT), {"eps": 1e-5}),
    Case("add_rms_norm", "fp32, 768 wide", (((4, 512, 768), SINGLE),) * 2 + (((768,), SINGLE),), {"eps": 1e-5}),
    Case("rope", "bf16, halves", (_X, _ANGLES, _ANGLES), {"heads": 12}),
    Case("rope", "bf16, adjacent pairs", (_X, _ANGLES, _ANGLES), {"heads": 12, "interleaved": True}),
    Case("activation", "bf16, gelu", (_X,), {"function": "gelu"}),
    Case("glu", "bf16, silu", (_X, _X), {"function": "silu"}),
    Case(
        "merge_tokens",
        "bf16, 768 wide, sizes",
        (_X, ((4, 384), _INDEX), ((4, 128), _INDEX), ((4, 128), _INDEX), ((4, 512), HALF)),
    ),
)

_BYTES, _WIDE = torch.uint8, ((3072,), HALF)
_SCALES, _CODES = ((3072, 12), HALF), ((3072, 1, 768), _BYTES)
_LINEAR = (
    Case("linear_activation", "bf16, gelu", (_X, ((3072, 768), HALF), _WIDE), {"function": "gelu"}),
    Case(
        "linear_activation",
        "fp32, gelu",
        (((4, 512, 768), SINGLE), ((3072, 768), SINGLE), ((3072,), SINGLE)),
        {"function": "gelu"},
    ),
    Case("weight_only_linear", "int4, bf16", (_X, ((3072, 12, 32), _BYTES), _SCALES), {"bits": 4}),
    Case(
        "weight_only_linear",
        "int4, bf16, one row, zeros",
        (((1, 1, 768), HALF), ((3072, 12, 32), _BYTES), _SCALES, ((3072, 6), _BYTES), _WIDE),
        {"bits": 4},
    ),
    Case("weight_only_linear", "int8, bf16", (_X, ((3072, 12, 64), _BYTES), _SCALES), {"bits": 8}),
    Case("float_weight_linear", "E4M3, bf16", (_X, _CODES, ((3072, 1), HALF)), {"format": "fp8_e4m3"}),
    Case(
        "float_weight_linear",
        "E2M1 in groups of 32, bf16",
        (_X, ((3072, 24, 16), _BYTES), ((3072, 24), _BYTES)),
        {"format": "fp4_e2m1"},
    ),
    Case("float8_linear", "one scale a channel, bf16", (_X, _CODES, ((3072, 1), HALF), None, _WIDE)),
    Case("float8_linear", "groups of 64, bf16", (_X, ((3072, 12, 64), _BYTES), ((3072, 12), _BYTES))),
    Case(
        "quantized_linear",
        "int8, bf16",
        (_X, ((3072, 768), torch.int8), _WIDE, _WIDE, ((), HALF), ((), _BYTES)),
    ),
)

_SSD = (
    ((4, 512, 1536), HALF),
    ((4, 512, 24), HALF),
    ((24,), SINGLE),
    ((4, 512, 128), HALF),
    ((4, 512, 128), HALF),
    ((24,), HALF),
)
_CHANNELS, _STATES = ((4, 512, 1536), HALF), ((4, 512, 16), HALF)
_SCAN = (_CHANNELS, _CHANNELS, ((1536, 16), SINGLE), _STATES, _STATES, ((1536,), HALF))
_KEYS, _BETA = ((4, 512, 1024), HALF), ((4, 512, 8), HALF)
_RECURRENT = (
    Case("delta_rule", "bf16, 64 wide", (_X, _X, _X, ((4, 512, 12), HALF)), {"heads": 12}),
    Case("delta_rule", "bf16, 128 wide", (_KEYS, _KEYS, _KEYS, _BETA), {"heads": 8}),
    Case("delta_rule", "fp32, 64 wide", (_SINGLE, _SINGLE, _SINGLE, ((4, 512, 12), SINGLE)), {"heads": 12}),
    Case(
        "delta_rule_resumed",
        "bf16, 128 wide",
        (_KEYS, _KEYS, _KEYS, _BETA, ((4, 8, 128, 128), HALF)),
        {"heads": 8},
    ),
    Case("retention", "bf16, 64 wide", (_X, _X, _X, ((12,), SINGLE)), {"heads": 12}),
    Case("retention", "fp32, 64 wide", (_SINGLE, _SINGLE, _SINGLE, ((12,), SINGLE)), {"heads": 12}),
    Case("ssd", "bf16, states of 128 by 64", _SSD, {"heads": 24}),
    Case("selective_scan", "bf16, 16 states", _SCAN),
    Case("linear_attention", "bf16, 64 wide", (_X, _X, _X), {"heads": 12, "causal": True}),
    Case("gated_linear_attention", "bf16, 64 wide", (_X, _X, _X, _X), {"heads": 12}),
    Case("gated_linear_attention", "bf16, 128 wide", (_X, _X, _X, _X), {"heads": 6}),
    Case("gated_linear_attention", "fp32, 64 wide", (_SINGLE, _SINGLE, _SINGLE, _SINGLE), {"heads": 12}),
)

CASES: tuple[Case, ...] = (*_ATTENTION, _SPARSE, *_ENTMAX, *_ROWS, *_LINEAR, *_RECURRENT)
