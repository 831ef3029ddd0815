"""Simulated logarithmic quantization against definitions in numpy, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.definition import load_operators, xf


def base_two(x: np.ndarray, scale: float, bits: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        codes = np.rint(-np.log2(np.clip(x, 0, scale).astype(np.float64) / scale))
    levels = scale * 2.0 ** -np.clip(codes, 0, 2**bits - 1)
    return np.where(codes >= 2**bits, 0, levels).astype(x.dtype)


def base_root_two(x: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """RepQuant's: codes in base sqrt 2, clipped; run in base 2 with a factor of sqrt 2 on odd codes."""
    with np.errstate(divide="ignore"):
        codes = np.rint(-2 * np.log2(np.clip(x, 0, scale).astype(np.float64) / scale))
    codes = np.clip(codes, 0, 2**bits - 1)
    odd = codes % 2 == 1
    return (2.0 ** -np.ceil(codes / 2) * (scale * (1 + odd * (np.sqrt(2) - 1)))).astype(x.dtype)


def adaptive(x: np.ndarray, scale: float, bits: int, q: int) -> np.ndarray:
    """AdaLog's: base 2^(q/37), a shift and a table of bits + 1 bits."""
    r, steps = 37, 2 ** (bits + 1) - 2
    with np.errstate(divide="ignore"):
        codes = np.rint(-(r / q) * np.log2(np.clip(x, 0, scale).astype(np.float64) / scale))
    found = np.zeros(x.shape)
    for k in range(2**bits):
        entry = np.rint(2.0 ** (-(k * q % r) / r) * steps) / steps
        found[codes == k] = scale * 2.0 ** -(k * q // r) * entry
    return found.astype(x.dtype)


def drawn() -> np.ndarray:
    x = np.random.default_rng(3).uniform(size=(4, 9, 50)).astype(np.float32) ** 4
    x[0, 0, :5] = (0, 1, 2, -0.5, 1e-12)
    return x


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("scale", [1.0, 0.375])
def test_definitions(bits: int, scale: float) -> None:
    x = drawn()

    def found(**options: Any) -> np.ndarray:
        result = xf.log_quantize(torch.from_numpy(x), torch.tensor(scale), bits=bits, **options)
        return np.asarray(result.numpy())

    np.testing.assert_array_equal(found(numerator=1, denominator=1), base_two(x, scale, bits))
    root = found(numerator=1, denominator=2, flush=False)
    # the factor of odd codes is rounded elsewhere: in the last place of a double
    np.testing.assert_allclose(root, base_root_two(x, scale, bits), rtol=1.2e-7)
    assert (root == base_root_two(x, scale, bits)).mean() > 0.99
    for q in (10, 37, 61, 138):
        found_by_table = found(numerator=q, denominator=37, round_table=True)
        np.testing.assert_array_equal(found_by_table, adaptive(x, scale, bits, q))


def test_nan_stays() -> None:
    x = torch.tensor([float("nan"), 0.5])
    assert xf.log_quantize(x, torch.tensor(1.0), bits=4, numerator=1, denominator=1).isnan().tolist() == [True, False]


def test_torch_accepts_the_operator() -> None:
    operator = load_operators()["log_quantize"]
    x = torch.from_numpy(drawn()).requires_grad_()
    options = {"bits": 4, "numerator": 40, "denominator": 37}
    torch.library.opcheck(operator.overload, (x, torch.tensor(1.0)), options)
    assert operator.flops(x, torch.tensor(1.0), **options) == 16 * x.numel()


def test_gradients_go_straight_through() -> None:
    x = torch.tensor([0.3, 0.9, 2.0, -1.0], requires_grad=True)
    xf.log_quantize(x, torch.tensor(1.0), bits=4, numerator=1, denominator=1).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9, "numerator": 1, "denominator": 1}, "2 to 8 bits"),
        ({"bits": 4, "numerator": 0, "denominator": 1}, "larger than 1"),
        ({"bits": 4, "numerator": 1, "denominator": 0}, "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        xf.log_quantize(torch.empty(2, 4, device="meta"), torch.empty((), device="meta"), **options)
