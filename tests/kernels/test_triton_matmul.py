"""The Triton kernels of linear layers, under Triton's interpreter, at sizes that fill no block."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn

from xformopt.kernels.activation.reference import FUNCTIONS
from xformopt.kernels.definition import load_operators
from xformopt.kernels.packing import pack, packed_size
from xformopt.kernels.triton_form import load_kernels


@pytest.mark.parametrize("function", FUNCTIONS)
def test_linear_with_its_activation(function: str) -> None:
    assert_kernel("linear_activation", randn(3, 25, 37), randn(70, 37), randn(70), function=function)


def test_more_rows_than_a_group_of_programs() -> None:
    assert_kernel("linear_activation", randn(600, 5), randn(65, 5), None, function="relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_in_half_precision(dtype: torch.dtype) -> None:
    x, weight, bias = randn(21, 74, dtype=dtype)[:, :37], randn(33, 37, dtype=dtype), randn(33, dtype=dtype)
    assert_kernel("linear_activation", x, weight, bias, function="gelu")


def codes(*shape: int, bits: int) -> torch.Tensor:
    drawn = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    return pack(drawn, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(("groups", "size", "rows"), [(3, 32, 21), (5, 16, 1), (2, 128, 7)])
def test_weights_of_few_bits(bits: int, has_zero: bool, groups: int, size: int, rows: int) -> None:
    weight, scale = codes(70, groups, size, bits=bits), randn(70, groups) * 0.1
    zero = codes(70, groups, bits=bits) if has_zero else None
    assert zero is None or zero.shape == (70, packed_size(groups, bits))
    assert_kernel("weight_only_linear", randn(rows, groups * size), weight, scale, zero, randn(70), bits=bits)


def test_weights_of_few_bits_in_half_precision() -> None:
    weight, scale = codes(33, 2, 32, bits=4), randn(33, 2, dtype=torch.bfloat16)
    assert_kernel("weight_only_linear", randn(2, 9, 64, dtype=torch.bfloat16), weight, scale, bits=4)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(3), dtype=torch.int8)


@pytest.mark.parametrize("is_static", [False, True])
def test_products_of_integers(is_static: bool) -> None:
    x, scale, bias = randn(3, 25, 75), randn(70).abs() * 0.01, randn(70)
    zero = (torch.tensor(0.02), torch.tensor(113, dtype=torch.uint8)) if is_static else (None, None)
    # in float32: the codes must be those of the definition, to the last rounding
    ours = computed("quantized_linear", x, integers(70, 75), scale, bias, *zero)
    wanted = load_operators()["quantized_linear"].reference(x, integers(70, 75), scale, bias, *zero)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_halves_round_to_even_and_codes_end_at_0_and_255() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf")]]).T
    zero = (torch.tensor(1.0), torch.tensor(100, dtype=torch.uint8))
    ours = computed("quantized_linear", x, torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, *zero)
    assert ours.flatten().tolist() == [0, 2, 2, 0, -2, 155, -100, 155]


def test_what_is_refused_is_said() -> None:
    kernels = load_kernels()
    x, scale = randn(2, 72), randn(8, 9)
    weight = codes(8, 9, 8, bits=8)
    assert "8 channels" in str(kernels["weight_only_linear"].accepts(x, weight, scale, bits=8))
    assert "3 bits" in str(kernels["weight_only_linear"].accepts(x, weight, scale, bits=3))
    assert "torch.float16" in str(kernels["weight_only_linear"].accepts(x.half(), weight, scale, bits=8))
    assert "torch.float64" in str(kernels["quantized_linear"].accepts(x.double(), integers(8, 72), randn(8)))
    assert "torch.float16" in str(kernels["linear_activation"].accepts(x, randn(8, 72).half(), function="relu"))
