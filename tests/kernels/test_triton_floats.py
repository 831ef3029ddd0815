"""The Triton kernels of linear layers in floating point of 4 and 8 bits, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn, relative

from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.float_formats import FORMATS, pack_floats
from xformopt.kernels.triton_form import load_kernels

SCALES = ("floats", "halves", "powers", "codes")


def weights(outputs: int, groups: int, size: int, name: str = "fp8_e4m3") -> torch.Tensor:
    """Codes of all finite numbers."""
    found, generator = FORMATS[name], torch.Generator().manual_seed(size)
    finite = 2 ** (found.bits - 1) - found.unused
    shape = (outputs, groups, size)
    sign = torch.randint(0, 2, shape, generator=generator) << (found.bits - 1)
    codes = (torch.randint(0, finite, shape, generator=generator) | sign).to(torch.uint8)
    return pack_floats(codes, found.bits)


def scales(kind: str, outputs: int, groups: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind in ("floats", "halves"):
        return randn(outputs, groups).abs().to(torch.float16 if kind == "halves" else torch.float32), None
    drawn = torch.randint(1, 126, (outputs, groups), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return (drawn, torch.tensor(0.37)) if kind == "codes" else (drawn // 10 + 118, None)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
@pytest.mark.parametrize("kind", SCALES)
def test_weights_in_floats_of_few_bits(name: str, kind: str) -> None:
    scale, base = scales(kind, 70, 3)
    weight = weights(70, 3, 32, name)
    assert_kernel("float_weight_linear", randn(5, 5, 96), weight, scale, base, randn(70), format=name)


def test_every_code_is_its_number() -> None:
    """One token picks one channel, so that the kernel writes the table of the format."""
    for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1"):
        found = FORMATS[name]
        table = torch.tensor(found.values)
        codes = torch.where(table.isfinite(), torch.arange(len(table)), 0).to(torch.uint8)
        packed = pack_floats(codes[None, None], found.bits)
        ours = computed("float_weight_linear", torch.eye(len(table)), packed, torch.ones(1, 1), format=name)
        assert torch.equal(ours.flatten(), table[codes.long()])


def test_one_row_and_one_scale_in_half_precision() -> None:
    x = randn(1, 96, dtype=torch.bfloat16)
    assert_kernel("float_weight_linear", x, weights(33, 1, 96), torch.ones(33, 1) * 0.01, format="fp8_e4m3")


@pytest.mark.parametrize(("groups", "size", "kind"), [(1, 75, "floats"), (2, 64, "powers"), (3, 32, "codes")])
def test_products_of_floats_of_8_bits(groups: int, size: int, kind: str) -> None:
    scale, base = scales(kind, 70, groups)
    x, weight, bias = randn(3, 25, groups * size, dtype=torch.bfloat16), weights(70, groups, size), randn(70).bfloat16()
    x[0, 3] = 0.0
    assert_kernel("float8_linear", x, weight, scale, base, bias)


def test_rows_are_rounded_to_nearest_in_their_own_range() -> None:
    """The largest number of a row is 448 times a power of two, and the product with ones shows the codes themselves."""
    x = torch.tensor([448, 17, 19, 0.0009, 0.003, -21, 0, 0.3]) * torch.tensor([[1.0], [0.125]])
    ours = computed("float8_linear", x.half(), weights_of_identity(8), torch.ones(8, 1))
    wanted = torch.tensor([448, 16, 20, 0, 2.0**-8, -20, 0, 0.3125])
    assert torch.equal(ours.float(), wanted * torch.tensor([[1.0], [0.125]]))


def weights_of_identity(size: int) -> torch.Tensor:
    one = FORMATS["fp8_e4m3"].values.index(1.0)
    return (torch.eye(size) * one).to(torch.uint8).unsqueeze(1)


def test_the_operator_is_the_two_it_replaces() -> None:
    x, weight = randn(2, 5, 64).double(), weights(7, 2, 32)
    scale = torch.full((7, 2), 120, dtype=torch.uint8)
    apart = xf.float_weight_linear(xf.fake_quantize_float(x, format="fp8_e4m3"), weight, scale, format="fp8_e4m3")
    assert relative(xf.float8_linear(x, weight, scale), apart) == 0.0
    torch.library.opcheck(xf.float8_linear, (x.requires_grad_(), weight, scale))
    assert load_operators()["float8_linear"].flops(x, weight) == 640 * 9 + 2 * 640 * 7


def test_what_is_refused_is_said() -> None:
    kernels, x, half = load_kernels(), randn(2, 96), randn(2, 96).half()
    scale = torch.ones(7, 3)
    sixes = kernels["float_weight_linear"].accepts(x, weights(7, 3, 32, "fp6_e3m2"), scale, format="fp6_e3m2")
    assert "6 bits" in str(sixes)
    assert "8 channels" in str(kernels["float_weight_linear"].accepts(x, weights(7, 12, 8), scale, format="fp8_e4m3"))
    assert "torch.float64" in str(kernels["float8_linear"].accepts(x.double(), weights(7, 3, 32), scale))
    wide = randn(2, 17000)
    assert "17000 wide" in str(kernels["float8_linear"].accepts(wide, weights(7, 1, 17000), scale))
    assert "16 channels" in str(kernels["float8_linear"].accepts(half, weights(7, 6, 16), scale))
    assert kernels["float8_linear"].capability == (8, 9)
