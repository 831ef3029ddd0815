"""TVM kernels against the definitions, into outputs that were NaN, at sizes nothing divides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.activation.reference import FUNCTIONS
from xformopt.kernels.attention.reference import attention as reference_attention
from xformopt.kernels.attention.tvm import Sizes, attention
from xformopt.kernels.linear.tvm import matmul, pack
from xformopt.kernels.tvm_form import Tile
from xformopt.kernels.tvm_math import FUNCTIONS as TVM_FUNCTIONS

tvm = pytest.importorskip("tvm")


def run(function: Any, shape: tuple[int, ...], *operands: torch.Tensor | np.ndarray) -> np.ndarray:
    """Compile a function for this machine and return what it writes over NaN."""
    module = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target="llvm")
    output = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    module["main"](*(tvm.runtime.tensor(np.ascontiguousarray(operand)) for operand in operands), output)
    return np.asarray(output.numpy())


@pytest.mark.parametrize("function", [None, *FUNCTIONS])
def test_matmul(function: str | None, rng: torch.Generator) -> None:
    rows, inner, columns = 9, 13, 21
    x, w, bias = (torch.randn(shape, generator=rng) * 2 for shape in ((rows, inner), (columns, inner), (columns,)))
    tile = Tile(4, 8)
    kernel = matmul((rows, inner), (rows, columns), tile, has_bias=True, function=function)
    found = run(kernel, (rows, columns), x.numpy(), pack(w.numpy(), tile.columns), bias.numpy())
    expected = torch.nn.functional.linear(x, w, bias)
    expected = FUNCTIONS[function](expected) if function else expected
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=2e-5)


def test_matmul_without_bias_in_tiles_that_fit(rng: torch.Generator) -> None:
    x, w = torch.randn(8, 5, generator=rng), torch.randn(16, 5, generator=rng)
    found = run(
        matmul((8, 5), (8, 16), Tile(4, 8), has_bias=False, function=None), (8, 16), x.numpy(), pack(w.numpy(), 8)
    )
    np.testing.assert_allclose(found, (x @ w.T).numpy(), rtol=1e-5, atol=1e-5)


def test_every_activation_has_a_kernel() -> None:
    assert set(TVM_FUNCTIONS) == set(FUNCTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_left": 2, "window_right": 1},
        {"kv_heads": 2},
        {"has_mask": True},
        {"has_mask": True, "causal": True, "kv_heads": 1},
    ],
    ids=str,
)
def test_attention(options: dict[str, Any], rng: torch.Generator) -> None:
    settings = {"kv_heads": 4, "has_mask": False, "causal": False, "window_left": -1, "window_right": -1, **options}
    sizes = Sizes(B=2, T=7, S=9, heads=4, D=5, E=3, scale=0.45, **settings)
    q = torch.randn(2, 7, 20, generator=rng)
    k = torch.randn(2, 9, sizes.kv_heads * 5, generator=rng)
    v = torch.randn(2, 9, sizes.kv_heads * 3, generator=rng)
    mask = torch.rand(2, 9, generator=rng) > 0.3
    # a sequence without any key
    mask[1] = False
    hiding = {name: settings[name] for name in ("causal", "window_left", "window_right", "kv_heads")}
    expected = reference_attention(q, k, v, mask if sizes.has_mask else None, heads=4, scale=0.45, **hiding)
    operands = [q.numpy(), k.numpy(), v.numpy(), *([mask.numpy()] if sizes.has_mask else [])]
    found = run(attention(sizes, Tile(4, 8)), (2, 7, 12), *operands)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    if sizes.has_mask:
        assert not found[1].any()
