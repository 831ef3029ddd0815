"""Simulated uniform quantization against its definition in numpy, bit for bit, and its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.definition import load_operators, xf


def rounded(x: np.ndarray, scale: Any, zero: Any, bits: int) -> np.ndarray:
    """Codes first, then what they stand for; everything in the precision of ``x``."""
    scale, zero = np.asarray(scale, x.dtype), np.asarray(zero, x.dtype)
    codes = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).astype(x.dtype)


def own_range(x: np.ndarray, bits: int, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum(x.min(axis, keepdims=axis is not None), 0)
    high = np.maximum(x.max(axis, keepdims=axis is not None), 0)
    scale = np.where(high > low, (high - low) / x.dtype.type(2**bits - 1), 1).astype(x.dtype)
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def drawn(dtype: Any = np.float32) -> np.ndarray:
    x = np.random.default_rng(7).normal(size=(3, 7, 12)).astype(dtype) * 3
    x[0, 0, :4] = (0, 40, -40, 0.5)
    x[1] = 0
    return x


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_given_ranges(bits: int, dtype: Any) -> None:
    x = drawn(dtype)
    random = np.random.default_rng(bits)
    for shape in ((), (12,)):
        scale = np.asarray(random.uniform(0.01, 0.5, shape), dtype)
        for zero in (None, random.integers(0, 2**bits, shape).astype(np.uint8), random.integers(-9, 30, shape)):
            given = None if zero is None else torch.from_numpy(np.asarray(zero))
            found = xf.fake_quantize(torch.from_numpy(x), torch.from_numpy(scale), given, bits=bits)
            want = rounded(x, scale, 2 ** (bits - 1) if zero is None else zero, bits)
            np.testing.assert_array_equal(found.numpy(), want)
            assert all(len(np.unique(want[..., c])) <= 2**bits for c in range(12))


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("axis", [None, -1])
def test_ranges_of_the_value_itself(bits: int, axis: int | None) -> None:
    x = drawn()
    found = xf.fake_quantize(torch.from_numpy(x), bits=bits, per_token=axis is not None)
    np.testing.assert_array_equal(found.numpy(), rounded(x, *own_range(x, bits, axis), bits))


def test_infinite_values_are_clipped_and_nan_stays() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    found = xf.fake_quantize(x, torch.tensor(0.5), torch.tensor(3, dtype=torch.uint8), bits=4)
    assert found[:2].tolist() == [6.0, -1.5]
    assert found[2].isnan()


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 4},
        {"bits": 4, "per_token": True},
        {"bits": 6, "scale": torch.tensor(0.25), "zero": torch.tensor(3, dtype=torch.uint8)},
        {"bits": 3, "scale": torch.rand(12) + 0.1},
    ],
)
def test_torch_accepts_the_operator(arguments: dict[str, Any]) -> None:
    operator = load_operators()["fake_quantize"]
    x = torch.from_numpy(drawn()).requires_grad_()
    options = dict(arguments)
    given = (x, *(options.pop(name) for name in ("scale", "zero") if name in options))
    torch.library.opcheck(operator.overload, given, options)
    turned = x.detach().transpose(0, 1)
    guess = operator.infer(turned, *given[1:], **options)
    assert (guess.shape, guess.stride()) == (turned.shape, operator.reference(turned, *given[1:], **options).stride())
    assert operator.flops(*given, **options) == x.numel() * (5 if "scale" in arguments else 7)


def test_gradients_go_straight_through_the_rounding() -> None:
    x = torch.tensor([0.0, 0.3, 0.9, 2.6, 7.0, -1.0], requires_grad=True)
    scale, zero = torch.tensor(0.5, requires_grad=True), torch.tensor(0, dtype=torch.uint8)
    xf.fake_quantize(x, scale, zero, bits=3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 1, 0, 0]
    # learned step sizes: round(u) - u within the range, the clipped code outside of it
    steps = x.detach() / 0.5
    wanted = sum(float(u.round() - u) if 0 <= u <= 7 else float(u.clamp(0, 7)) for u in steps)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(wanted)
    free = torch.randn(4, 5, requires_grad=True)
    xf.fake_quantize(free, bits=4, per_token=True).sum().backward()
    assert free.grad is not None
    assert bool((free.grad >= 0).all())
    assert int((free.grad == 1).sum()) >= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "2 to 8 bits"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"bits": 4, "zero": (4,)}, "zero goes together with scale"),
        ({"bits": 4, "scale": (), "per_token": True}, "a given scale is not per token"),
        ({"bits": 4, "scale": (3,)}, "one number per channel"),
        ({"bits": 4, "scale": (4,), "zero": ()}, "scale and zero disagree"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {n: torch.empty(v, device="meta") if isinstance(v, tuple) else v for n, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        xf.fake_quantize(torch.empty(2, 4, device="meta"), **given)


@pytest.mark.parametrize("is_static", [True, False])
def test_gradients_go_straight_through_products_of_integers(is_static: bool) -> None:
    x, scale = torch.randn(3, 6, requires_grad=True), torch.rand(4) + 0.1
    weight = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    given = (torch.tensor(0.01), torch.tensor(100, dtype=torch.uint8)) if is_static else ()
    back = torch.randn(3, 4)
    xf.quantized_linear(x, weight, scale, None, *given).backward(back)
    wanted = (back * scale) @ weight.float()
    # codes reach from 0 to 255, around 100
    kept = ((x / 0.01).round() >= -100) & ((x / 0.01).round() <= 155) if is_static else torch.ones_like(x) > 0
    assert bool(kept.all()) != is_static
    torch.testing.assert_close(x.grad, wanted * kept)
