"""TVM kernels of weights stored in few bits against the definitions, and operators that TVM does not import."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.definition import xf
from xformopt.kernels.linear.tvm import pack
from xformopt.kernels.packing import pack as pack_codes
from xformopt.kernels.packing import packed_size
from xformopt.kernels.quantized_embedding.tvm import lookup
from xformopt.kernels.tvm_form import Tile
from xformopt.kernels.weight_only_linear.tvm import code_panels, matmul, shifts
from xformopt.lowering import lower
from xformopt.program import Program

tvm = pytest.importorskip("tvm")


def run(function: Any, shape: tuple[int, ...], *operands: torch.Tensor | np.ndarray) -> np.ndarray:
    """Compile a function for this machine and return what it writes over NaN."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())})
    compiled = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    output = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    compiled["main"](*(tvm.runtime.tensor(np.ascontiguousarray(operand)) for operand in operands), output)
    return np.asarray(output.numpy())


@pytest.mark.parametrize(
    ("bits", "groups", "size", "has_zero"), [(4, 3, 8, True), (4, 2, 5, False), (8, 1, 13, True), (3, 2, 8, False)]
)
def test_weight_only_linear(bits: int, groups: int, size: int, has_zero: bool, rng: torch.Generator) -> None:
    rows, columns, tile = 9, 21, Tile(4, 8)
    x, bias = torch.randn(rows, groups * size, generator=rng), torch.randn(columns, generator=rng)
    codes = torch.randint(0, 2**bits, (columns, groups, size), generator=rng).to(torch.uint8)
    scale = torch.rand(columns, groups, generator=rng)
    zero = torch.randint(0, 256, (columns, packed_size(groups, bits)), generator=rng).to(torch.uint8)
    given = zero if has_zero else None
    per_byte = 2 if bits <= 4 and size % 2 == 0 else 1
    panels = code_panels(codes.flatten(1).numpy(), tile.columns, per_byte)
    factors = (pack(scale.numpy(), tile.columns), pack(shifts(scale, given, bits), tile.columns))
    kernel = matmul((rows, groups * size), (rows, columns), tile, groups, per_byte, has_bias=True)
    found = run(kernel, (rows, columns), x, panels, *factors, bias)
    expected = xf.weight_only_linear(x, pack_codes(codes, bits), scale, given, bias, bits=bits)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "kind", "has_zero"), [(4, torch.int64, True), (8, torch.int32, False)])
def test_quantized_embedding(bits: int, kind: torch.dtype, has_zero: bool, rng: torch.Generator) -> None:
    entries, groups, width = 11, 3, 18
    weight = torch.randint(0, 256, (entries, width * bits // 8), generator=rng).to(torch.uint8)
    indices = torch.tensor([[3, 10, 0], [3, 1, 2]], dtype=kind)
    scale = torch.randn(entries, groups, generator=rng)
    zero = torch.randint(0, 256, (entries, packed_size(groups, bits)), generator=rng).to(torch.uint8)
    zeros = (zero,) if has_zero else ()
    operands = (weight, indices, scale, *zeros)
    kernel = lookup([tuple(value.shape) for value in operands], (2, 3, width), bits, str(kind).removeprefix("torch."))
    expected = xf.quantized_embedding(*operands, bits=bits)
    np.testing.assert_allclose(run(kernel, (2, 3, width), *operands), expected.numpy(), rtol=1e-6)
    outside = torch.full((2, 3), 2**30, dtype=kind)
    nearest = xf.quantized_embedding(weight, torch.full_like(outside, entries - 1), scale, *zeros, bits=bits)
    found = run(kernel, (2, 3, width), weight, outside, scale, *zeros)
    np.testing.assert_allclose(found, nearest.numpy(), rtol=1e-6)


def test_what_tvm_does_not_import_is_said_in_its_other_operators() -> None:
    text = """
program "shifts" lifted
input %x: f32[3,4]
input %i: i64[3,4]
%a: f32[3,1] = aten.amax(%x) {dim=[1], keepdim=true}
%b: f32[4] = aten.amin(%x) {dim=[0]}
%c: f32[3,4] = aten.add.Tensor(%a, %b)
%l: i64[3,4] = aten.__lshift__.Scalar(%i) {other=3}
%r: i64[3,4] = aten.__rshift__.Tensor(%l, %i)
%f: i64[3,4] = aten.clamp(%i) {min=3}
%g: i64[3,4] = aten.clamp(%f) {max=8}
%h: f32[3,4] = aten.clamp(%x) {min=-0.5, max=0.25}
return c=%c, r=%r, g=%g, h=%h
"""
    program = Program.parse(text)
    given = {"x": torch.randn(3, 4), "i": torch.arange(12).reshape(3, 4)}
    found = lower(program, "tvm-cpu", measure=False).run(**{name: value.numpy() for name, value in given.items()})
    for name, value in program.run(given).items():
        np.testing.assert_array_equal(found[name], value.numpy())
