"""Linear layers whose weights are powers of two, or have two or three values: codes by Python's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xformopt.kernels.definition import load_operators, xf

WIDTH, ROWS = 7, 4


def codes_of(packed: torch.Tensor, bits: int) -> list[list[int]]:
    """Take codes out of rows of bytes one at a time."""
    rows = [int.from_bytes(bytes(row), "little") for row in packed.tolist()]
    return [[row >> bits * i & 2**bits - 1 for i in range(WIDTH)] for row in rows]


def power(code: int, bits: int, top: int) -> float:
    half = 2 ** (bits - 1)
    sign, place = (-1 if code >= half else 1), code % half
    return sign * 2.0 ** (top - (half - 1 - place)) if place else 0.0


def byte(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (ROWS, size), dtype=torch.uint8)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("has_bias", [False, True])
def test_shifts(bits: int, has_bias: bool) -> None:
    x, packed, bias = double(2, 5, WIDTH), byte(-(-WIDTH * bits // 8)), double(ROWS) if has_bias else None
    weight = [[power(code, bits, -1) for code in row] for row in codes_of(packed, bits)]
    wanted = torch.einsum("bti,oi->bto", x, torch.tensor(weight, dtype=x.dtype)) + (0 if bias is None else bias)
    found = xf.shift_linear(x, packed, bias, bits=bits, top=-1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    check_operator("shift_linear", (x, packed, bias), bits=bits, top=-1)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("scales", [1, ROWS])
def test_few_levels(bits: int, scales: int) -> None:
    x, packed, scale, bias = double(2, 5, WIDTH), byte(-(-WIDTH * bits // 8)), double(scales), double(ROWS)
    levels = {1: (-1, 1), 2: (-1, 0, 1, 0)}[bits]
    weight = torch.tensor([[levels[code] for code in row] for row in codes_of(packed, bits)]) * scale.reshape(-1, 1)
    wanted = torch.einsum("bti,oi->bto", x, weight) + bias
    found = xf.ternary_linear(x, packed, scale, bias, bits=bits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    check_operator("ternary_linear", (x, packed, scale, bias), bits=bits)


def check_operator(name: str, arguments: tuple[torch.Tensor | None, ...], **options: int) -> None:
    """What torch asks of an operator, its gradients, shape rule and cost."""
    operator = load_operators()[name]
    given = tuple(a.requires_grad_() if a is not None and a.is_floating_point() else a for a in arguments)
    torch.library.opcheck(operator.overload, given, options)
    places = [i for i, a in enumerate(given) if a is not None and a.is_floating_point()]

    def call(*values: torch.Tensor) -> torch.Tensor:
        filled = list(given)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        found: torch.Tensor = operator.overload(*filled, **options)
        return found

    assert torch.autograd.gradcheck(call, [given[i] for i in places], fast_mode=True)
    assert operator.infer(*given, **options).shape == operator.reference(*given, **options).shape
    assert operator.flops(*given, **options) == 2 * 2 * 5 * WIDTH * ROWS


def fake(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xf.shift_linear(*fake((2, 8), (3, 4)), bits=5, top=0), "disagree on the input width"),
        (lambda: xf.shift_linear(*fake((2, 8), (3, 4)), bits=4, top=0), "5 or 6 bits"),
        (lambda: xf.ternary_linear(*fake((2, 8), (3, 2), (3,)), bits=1), "disagree on the input width"),
        (lambda: xf.ternary_linear(*fake((2, 8), (3, 2), (2,)), bits=2), "one number, or one per output channel"),
        (lambda: xf.ternary_weight(*fake((2, 8)), bits=3), "1 or 2 bits"),
        (lambda: xf.ternary_weight(*fake((8,)), bits=1), "must be a matrix"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
