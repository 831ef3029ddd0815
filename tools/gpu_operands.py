"""Operands of the kernels' cases with values that make sense, what a call costs, and what a machine allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import Case
from torch.nn import functional

from xformopt.kernels.definition import load_operators

__all__ = ["Cost", "Peaks", "bytes_of", "cost_of", "in_double", "operands_of_case", "widened"]

SEED = 11
# codes of 8 bits that most activations lie between
_STEP = 0.03


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches: bytes copied (read and written) and products of matrices in bfloat16, a second."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a call, and the bytes of its operands and results, each moved once."""

    flops: float
    bytes: float

    def floor_ms(self, peaks: Peaks) -> float:
        """Return the least time a call can take: the longer of moving its bytes and doing its products."""
        return max(self.bytes / peaks.bytes_per_second, self.flops / peaks.flops_per_second) * 1e3


def operands_of_case(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
    """Return operands of a case: its floats in ``dtype``, but for those that a case in halves wants in float32.

    The same numbers whenever it is called.
    """
    generator = torch.Generator().manual_seed(SEED)
    may_stay = case.operands[0][1] != torch.float32
    drawn = [_drawn(value, dtype, may_stay, generator) for value in case.operands]
    options = {name: _drawn(value, dtype, may_stay, generator) for name, value in case.options.items()}
    adjust = _ADJUST.get(case.operator)
    if adjust is not None:
        drawn = adjust(drawn)
    return [_to(value, device) for value in drawn], {name: _to(value, device) for name, value in options.items()}


def widened(case: Case, factor: int) -> Case:
    """Return the case with ``factor`` times as many sequences."""

    def wide(value: Any) -> Any:
        is_batch = isinstance(value, tuple) and len(value[0]) > 1 and value[0][0] == 4
        return ((4 * factor, *value[0][1:]), value[1]) if is_batch else value

    return Case(case.operator, case.name, tuple(map(wide, case.operands)), case.options)


def cost_of(case: Case, args: list[Any], options: dict[str, Any], result: Any) -> Cost:
    """Return what a call costs; of attention, only pairs of a query and a key that it may see."""
    flops = float(load_operators()[case.operator].flops(*args, **options))
    if case.operator == "attention_packed":
        lengths = args[3].diff().double()
        flops *= float((lengths**2).sum() / args[0].shape[1] ** 2)
    if case.operator.startswith("attention") and options.get("causal"):
        T, S = args[0].shape[1], args[1].shape[1]
        window = min(options.get("window_left", -1) % (S + 1) + 1, S)
        seen = sum(min(max(S - T + row + 1, 0), window) for row in range(T))
        flops *= seen / (T * S)
    results = result if isinstance(result, tuple) else (result,)
    tensors = [value for value in (*args, *options.values(), *results) if isinstance(value, torch.Tensor)]
    return Cost(flops, bytes_of(*tensors))


def bytes_of(*tensors: torch.Tensor) -> float:
    """Return the bytes of all elements."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def in_double(value: Any) -> Any:
    """Return floats in double precision, and everything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _drawn(value: Any, dtype: torch.dtype, may_stay: bool, generator: torch.Generator) -> Any:
    if not isinstance(value, tuple):
        return value
    shape, wanted = value
    if wanted == torch.bool:
        return torch.rand(shape, generator=generator) < 0.8
    if not wanted.is_floating_point:
        low, high = (-127, 128) if wanted == torch.int8 else (0, 256)
        return torch.randint(low, high, shape, generator=generator).to(wanted)
    return torch.randn(shape, generator=generator).to(wanted if may_stay and wanted == torch.float32 else dtype)


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _packed(operands: list[Any]) -> list[Any]:
    """Sequences of unequal lengths, one of them empty; of the keys, what is a token."""
    q, k, v, offsets, keys = operands
    tokens, sequences = q.shape[1], offsets.shape[0] - 1
    shares = torch.arange(sequences).double()
    ends = (shares.cumsum(0) / shares.sum() * tokens).round().long()
    offsets = torch.cat([ends.new_zeros(1), ends])
    return [q, k, v, offsets, None if keys is None else offsets.diff() - offsets.diff().clamp(max=1)]


def _merged(operands: list[Any]) -> list[Any]:
    """Distinct tokens that stay and that go, and places among those that stay."""
    x, kept, sources, destinations, sizes = operands
    order = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(SEED)).argsort(1)
    count = kept.shape[1]
    return [x, order[:, :count], order[:, count : count + sources.shape[1]], destinations % count, sizes.abs() + 1]


def _rotated(operands: list[Any]) -> list[Any]:
    x, angles, _ = operands
    return [x, angles.cos(), angles.sin()]


def _steps(operands: list[Any]) -> list[Any]:
    x, dt, a, b, c, skip = operands
    return [x, (dt.float() - 3).exp().to(dt.dtype), -a.abs() - 0.1, b, c, skip]


def _few_bits(operands: list[Any]) -> list[Any]:
    x, codes, scale, *rest = operands
    return [x, codes, scale.abs() * 0.01 + 0.001, *rest]


def _floats(operands: list[Any]) -> list[Any]:
    """Codes that are numbers; tokens whose range is a power of two, so that float64 rounds them as a GPU does."""
    x, codes, scale, *rest = operands
    x = (x / 4).clamp(-1, 1)
    x[..., 0] = 448 / 512
    given = scale.abs() * 0.01 + 0.001 if scale.is_floating_point() else scale % 8 + 116
    return [x.clamp(-448 / 512, 448 / 512), torch.where(codes % 128 == 127, 0, codes).to(codes.dtype), given, *rest]


def _integers(operands: list[Any]) -> list[Any]:
    x, codes, scale, bias, x_scale, x_zero = operands
    return [x, codes, scale.abs() * 0.01 + 0.001, bias, x_scale * 0 + _STEP, x_zero * 0 + 128]


def _decays(place: int) -> Callable[[list[Any]], list[Any]]:
    """Log decays as models have them: a token keeps nine tenths and more of the state."""
    return lambda operands: [-0.1 * x.abs() if at == place else x for at, x in enumerate(operands)]


def _unit_keys(operands: list[Any]) -> list[Any]:
    """Keys of length one in each head, and rates up to 2, as with negative eigenvalues."""
    q, k, v, beta, *state = operands
    heads: torch.Tensor = k.unflatten(-1, (beta.shape[-1], -1))
    return [q, functional.normalize(heads, dim=-1).flatten(-2), v, 2 * beta.sigmoid(), *state]


_ADJUST: dict[str, Callable[[list[Any]], list[Any]]] = {
    "attention_packed": _packed,
    "merge_tokens": _merged,
    "rope": _rotated,
    "ssd": _steps,
    "selective_scan": _steps,
    "weight_only_linear": _few_bits,
    "float_weight_linear": _floats,
    "float8_linear": _floats,
    "quantized_linear": _integers,
    "retention": _decays(3),
    "gated_linear_attention": _decays(3),
    "delta_rule": _unit_keys,
    "delta_rule_resumed": _unit_keys,
}
