"""Cost is what the formulas of the operators say, at the sizes asked for."""

from __future__ import annotations

import pytest
import torch

from xformopt.analysis import cost
from xformopt.errors import ProgramError, UsageError
from xformopt.program import Program

B, T, C, H = 3, 5, 24, 4
PROGRAM = """program "m" {level}
dim batch in [1, inf]
dim length in [1, 512]
input %x: f32[batch,length,24]
input %ids: i64[batch,length] below 100
param %table: f32[100,24]
param %w: f32[24,24]
param %b: f32[24]
{body}
return y=%y
"""
LIFTED = """%e: f32[batch,length,24] = aten.embedding(%table, %ids)
%q: f32[batch,length,24] = xf.linear(%e, %w, %b)  # layer.q
%a: f32[batch,length,24] = xf.attention(%q, %x, %x) {heads=4, kv_heads=4, scale=0.5}  # layer
%s: f32[batch,length,24] = aten.add.Tensor(%a, %x)
%g: f32[batch,length,24] = xf.activation(%s) {function=gelu}
%y: f32[batch,length,24] = xf.layer_norm(%g) {eps=1e-05}"""


def parse(body: str, level: str) -> Program:
    return Program.parse(PROGRAM.format(body=body, level=level))


def test_counts_by_the_formulas() -> None:
    found = cost(parse(LIFTED, "lifted"), {"batch": B, "length": T})
    elements = B * T * C
    by_name = {node.name: node for node in found.by_node}
    assert by_name["e"].flops == 0
    assert by_name["q"].flops == 2 * elements * C
    assert by_name["a"].flops == 4 * B * T * T * C
    assert by_name["s"].flops == elements
    assert by_name["g"].flops == 8 * elements
    assert by_name["y"].flops == 8 * elements
    assert found.flops == sum(node.flops for node in found.by_node)
    assert found.operators["xf.attention"] == found.operators["aten.add"] == 1
    assert found.nodes == 6
    assert found.sizes == {"batch": B, "length": T}
    assert by_name["a"].path == "layer"


def test_counts_parameters_and_bytes() -> None:
    found = cost(parse(LIFTED, "lifted"), {"batch": B, "length": T})
    assert found.parameters == 100 * C + C * C + C
    assert found.parameter_bytes == 4 * found.parameters
    by_name = {node.name: node for node in found.by_node}
    # rows of the table read and written, and the indices
    assert by_name["e"].bytes == 2 * 4 * B * T * C + 8 * B * T
    assert by_name["q"].bytes == 4 * (2 * B * T * C + C * C + C)


def test_counts_inside_of_composite_aten() -> None:
    text = """program "m" captured
dim batch in [1, inf]
input %q: f32[batch,4,7,8]
input %image: f32[batch,3,8,8]
param %w: f32[5,8]
param %k: f32[4,3,2,2]
%a: f32[batch,4,7,8] = aten.scaled_dot_product_attention(%q, %q, %q)
%v: f32[batch,28,8] = aten.view(%a) {size=[-1, 28, 8]}
%l: f32[batch,28,5] = aten.linear(%v, %w)
%c: f32[batch,4,4,4] = aten.conv2d(%image, %k) {stride=[2, 2]}
%m: f32[batch,28] = aten.mean.dim(%l) {dim=[2]}
return l=%m, c=%c
"""
    found = {node.name: node for node in cost(Program.parse(text), {"batch": 2}).by_node}
    assert found["a"].flops == 4 * 2 * 4 * 7 * 7 * 8
    assert (found["v"].flops, found["v"].bytes) == (0, 0)
    assert found["l"].flops == 2 * 2 * 28 * 8 * 5
    assert found["c"].flops == 2 * 2 * 4 * 4 * 4 * 3 * 2 * 2
    assert found["m"].flops == 2 * 28 * 5


def test_of_a_quantized_table_only_some_rows_are_read() -> None:
    text = """program "m" target
dim batch in [1, inf]
input %ids: i64[batch,5] below 1000
param %codes: u8[1000,32]
param %scale: f32[1000,2]
param %zero: u8[1000,1]
%y: f32[batch,5,64] = xf.quantized_embedding(%codes, %ids, %scale, %zero) {bits=4}
return y=%y
"""
    (found,) = cost(Program.parse(text), {"batch": 2}).by_node
    assert found.bytes == 10 * (4 * 64 + 8 + 32 + 2 * 4 + 1)


def test_takes_missing_sizes_from_the_example() -> None:
    program = parse(LIFTED, "lifted")
    assert cost(program).sizes == {"batch": 2, "length": 2}
    program.example_inputs = {"x": torch.zeros(2, 9, C), "ids": torch.zeros(2, 9, dtype=torch.int64)}
    assert cost(program, {"batch": 4}).sizes == {"batch": 4, "length": 9}


def test_refuses_unknown_and_impossible_sizes() -> None:
    program = parse(LIFTED, "lifted")
    with pytest.raises(UsageError, match=r"no dynamic dimension 'width'; it has only batch, length"):
        cost(program, {"width": 3})
    with pytest.raises(ProgramError, match="length is 513"):
        cost(program, {"length": 513})
