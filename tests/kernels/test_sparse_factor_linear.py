"""A linear layer stored as sparse times dense: entries put in their places one at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.packing import pack

INPUTS, OUTPUTS, VECTORS, ENTRIES = 7, 5, 6, 3


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_sparse_times_dense(bits: int, has_bias: bool) -> None:
    x = torch.randn(2, 4, INPUTS, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(VECTORS, INPUTS, dtype=torch.float64, requires_grad=True)
    values = torch.randn(OUTPUTS, ENTRIES, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUTPUTS, dtype=torch.float64, requires_grad=True) if has_bias else None
    places = torch.stack([torch.randperm(VECTORS)[:ENTRIES] for _ in range(OUTPUTS)])
    given = (x, basis, pack(places.to(torch.uint8), bits), values, bias)
    wanted = torch.empty(2, 4, OUTPUTS, dtype=torch.float64)
    for row in range(OUTPUTS):
        vector = sum(values[row, entry] * basis[places[row, entry]] for entry in range(ENTRIES))
        wanted[..., row] = (x @ vector + (0 if bias is None else bias[row])).detach()
    torch.testing.assert_close(xf.sparse_factor_linear(*given, bits=bits).detach(), wanted, rtol=1e-12, atol=1e-12)
    operator = load_operators()["sparse_factor_linear"]
    torch.library.opcheck(operator.overload, given, {"bits": bits})
    assert operator.flops(*given, bits=bits) == 2 * 8 * VECTORS * (INPUTS + OUTPUTS)
    assert operator.infer(*given, bits=bits).shape == wanted.shape

    def call(x: torch.Tensor, basis: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = operator.overload(x, basis, given[2], values, bias, bits=bits)
        return found

    assert torch.autograd.gradcheck(call, (x, basis, values), fast_mode=True)


def fake(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xf.sparse_factor_linear(*fake((2, 8), (4, 7), (3, 1), (3, 2)), bits=4), "on the input width"),
        (lambda: xf.sparse_factor_linear(*fake((2, 8), (4, 8), (3, 1), (3, 2)), bits=1), "more vectors than places"),
        (lambda: xf.sparse_factor_linear(*fake((2, 8), (4, 8), (3, 2), (3, 2)), bits=4), "one code for each value"),
        (lambda: xf.sparse_factor_linear(*fake((2, 8), (4, 8), (3, 2), (3, 2)), bits=7), "5, 6 or 8 bits"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
