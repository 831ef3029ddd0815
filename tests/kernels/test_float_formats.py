"""Floating-point formats of few bits against their definitions, and against ml_dtypes where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.float_formats import FORMATS, pack_floats, round_float, scale_values, unpack_floats

# exponent bits, mantissa bits, bias, largest value, finite codes
FIELDS = {
    "fp8_e4m3": (4, 3, 7, 448.0, 254),
    "fp8_e5m2": (5, 2, 15, 57344.0, 248),
    "fp6_e3m2": (3, 2, 3, 28.0, 64),
    "fp6_e2m3": (2, 3, 1, 7.5, 64),
    "fp4_e2m1": (2, 1, 1, 6.0, 16),
}
ML_DTYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp6_e3m2": "float6_e3m2fn",
    "fp6_e2m3": "float6_e2m3fn",
    "fp4_e2m1": "float4_e2m1fn",
}
NAMES = list(FIELDS)


def decoded(code: int, exponent: int, mantissa: int, bias: int) -> float:
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    e, m = code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
    return sign * (m / 2**mantissa * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissa) * 2.0 ** (e - bias))


def nearest(x: np.ndarray, name: str) -> np.ndarray:
    """Search the whole table: the nearest value, of two equally near the one with an even mantissa."""
    values = np.array(FORMATS[name].values)
    finite = np.flatnonzero(np.isfinite(values))
    gaps = np.abs(x.reshape(-1, 1).astype(np.float64) - values[finite])
    order = np.lexsort((np.tile(finite % 2, (len(gaps), 1)), gaps), axis=1)[:, 0]
    return values[finite][order].reshape(x.shape)


def drawn(name: str) -> np.ndarray:
    values = np.array(FORMATS[name].values)
    values = np.sort(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    random = np.random.default_rng(3).normal(size=500) * FORMATS[name].largest / 3
    found = [values, middles, np.nextafter(middles, 9e9), random, random / 50, [9e9, -9e9, 0.0, 1e-30]]
    return np.concatenate(found).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_codes_stand_for_what_the_format_says(name: str) -> None:
    exponent, mantissa, bias, largest, finite = FIELDS[name]
    values = np.array(FORMATS[name].values)
    assert FORMATS[name].largest == largest == np.nanmax(values)
    assert int(np.isfinite(values).sum()) == finite
    wanted = np.array([decoded(code, exponent, mantissa, bias) for code in range(len(values))])
    np.testing.assert_array_equal(values[np.isfinite(values)], wanted[np.isfinite(values)])
    assert FORMATS[name].largest_exponent == np.floor(np.log2(largest))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_finds_the_nearest_value(name: str, dtype: torch.dtype) -> None:
    x = drawn(name)
    found = round_float(torch.from_numpy(x).to(dtype), name)
    np.testing.assert_array_equal(found.numpy(), nearest(x, name))
    assert round_float(torch.tensor([float("nan")]), name).isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_ml_dtypes_agrees(name: str) -> None:
    dtypes: Any = pytest.importorskip("ml_dtypes")
    kind = getattr(dtypes, ML_DTYPES[name])
    codes = np.arange(2 ** FORMATS[name].bits, dtype=np.uint8)
    theirs, ours = codes.view(kind).astype(np.float64), np.array(FORMATS[name].values)
    np.testing.assert_array_equal(theirs[np.isfinite(theirs)], ours[np.isfinite(theirs)])
    assert np.isnan(ours[~np.isfinite(theirs)]).all()
    # their conversion overflows to infinity or NaN, ours does not
    x = np.clip(drawn(name), -FORMATS[name].largest, FORMATS[name].largest)
    np.testing.assert_array_equal(round_float(torch.from_numpy(x), name).numpy(), x.astype(kind).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_unpacking_is_the_inverse_of_packing(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 24), dtype=torch.uint8)
    packed = pack_floats(codes, bits)
    assert packed.shape == (3, 5, 24 * bits // 8)
    assert torch.equal(unpack_floats(packed, bits), codes)


def test_four_codes_of_six_bits_fill_three_bytes_from_the_low_end() -> None:
    codes = [0b000001, 0b100010, 0b010011, 0b111100]
    whole = sum(code << 6 * place for place, code in enumerate(codes))
    packed = pack_floats(torch.tensor(codes, dtype=torch.uint8), 6).tolist()
    assert packed == list(whole.to_bytes(3, "little"))


def test_scales_are_stored_in_three_ways() -> None:
    like = torch.zeros((), dtype=torch.float64)
    powers = torch.tensor([[0, 127, 254, 130]], dtype=torch.uint8)
    assert scale_values(powers, None, like).tolist() == [[2.0**-127, 1.0, 2.0**127, 8.0]]
    codes = torch.tensor([[1, 0x38, 0x7E]], dtype=torch.uint8)
    assert scale_values(codes, torch.tensor(3.0), like).tolist() == [[3 * 2.0**-9, 3.0, 3 * 448.0]]
    halves = torch.tensor([[0.1]], dtype=torch.float16)
    assert scale_values(halves, None, like).tolist() == [[float(np.float16(0.1))]]


def arguments(name: str) -> tuple[torch.Tensor, ...]:
    bits = FORMATS[name].bits
    finite = 2 ** (bits - 1) - FORMATS[name].unused
    codes = torch.randint(0, finite, (7, 3, 8)) | torch.randint(0, 2, (7, 3, 8)) << (bits - 1)
    scale = torch.randint(120, 130, (7, 3), dtype=torch.uint8)
    return torch.randn(2, 5, 24, dtype=torch.float64), codes.to(torch.uint8), scale, torch.randn(7).double()


@pytest.mark.parametrize("name", NAMES)
def test_the_linear_layer_multiplies_by_the_values(name: str) -> None:
    x, codes, scale, bias = arguments(name)
    packed = pack_floats(codes, FORMATS[name].bits)
    found = xf.float_weight_linear(x, packed, scale, None, bias, format=name)
    exponent, mantissa, offset, *_ = FIELDS[name]
    values = [decoded(int(code), exponent, mantissa, offset) for code in codes.flatten()]
    matrix = np.array(values).reshape(7, 3, 8) * 2.0 ** (scale.numpy().astype(float)[..., None] - 127)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix.reshape(7, 24).T + bias.numpy(), rtol=1e-12)
    operator = load_operators()["float_weight_linear"]
    assert operator.flops(x, packed, scale, None, bias, format=name) == 2 * 2 * 5 * 24 * 7
    inferred = operator.infer(x, packed, scale, None, bias, format=name)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (found.shape, found.dtype, found.stride())


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_rounded_in_their_own_range(name: str) -> None:
    x = np.random.default_rng(5).normal(size=(2, 7, 12)).astype(np.float32) * [[[0.01]], [[100]]]
    x = x.astype(np.float32)
    x[0, 3] = 0
    x[1, 2, 5] = 3000
    found = xf.fake_quantize_float(torch.from_numpy(x), format=name)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(FORMATS[name].largest)
    scale[scale == 0] = 1
    np.testing.assert_array_equal(found.numpy(), nearest(x / scale, name).astype(np.float32) * scale)


def test_torch_accepts_the_operators() -> None:
    x, codes, scale, bias = arguments("fp4_e2m1")
    packed = pack_floats(codes, 4)
    given = (x.requires_grad_(), packed, scale, None, bias.requires_grad_())
    torch.library.opcheck(xf.float_weight_linear, given, {"format": "fp4_e2m1"})
    torch.library.opcheck(xf.fake_quantize_float, (x,), {"format": "fp8_e4m3"})
    (gradient,) = torch.autograd.grad(xf.fake_quantize_float(x, format="fp4_e2m1").sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "fp5"}, "format must be one of"),
        ({"format": "fp8_e4m3"}, "disagree on the input width"),
        ({"scale": torch.zeros(7, 2, dtype=torch.uint8)}, "one number per output channel and group"),
        ({"scale": torch.ones(7, 3), "base": torch.tensor(1.0)}, "base goes together with scales in E4M3"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    x, codes, scale, _ = arguments("fp4_e2m1")
    given = {"x": x, "weight": pack_floats(codes, 4), "scale": scale, "base": None, "format": "fp4_e2m1", **changed}
    with pytest.raises(RuntimeError, match=message):
        load_operators()["float_weight_linear"].infer(**given)
