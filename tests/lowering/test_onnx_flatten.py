"""Reshapes between linear layers written as Gemm disappear, and only where nothing but tokens is folded."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from xformopt.lowering.onnx_export import export_onnx
from xformopt.lowering.onnx_forms import build_graph
from xformopt.program import Program

ort = pytest.importorskip("onnxruntime")

HEADER = """
program "tokens" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %x: f32[batch,length,8]
input %row: f32[1,length,8]
param %w: f32[8,8]
param %b: f32[8]
%a: f32[batch,length,8] = xf.linear(%x, %w, %b)
"""


def lowered(body: str) -> tuple[Counter[str], float]:
    """Return the operators of the graph, and its relative error at an untraced size."""
    import onnx_ir as ir

    program = Program.parse(HEADER + body)
    model = build_graph(export_onnx(program), {"linear": "gemm"}).model
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = {"x": torch.randn(3, 7, 8), "row": torch.randn(1, 7, 8)}
    arrays = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    want, have = program.run(inputs)["y"].numpy(), session.run(None, arrays)[0]
    assert want.shape == have.shape
    return Counter(node.op_type for node in model.graph), float(np.linalg.norm(want - have) / np.linalg.norm(want))


def test_activations_and_residuals_stay_matrices() -> None:
    kinds, gap = lowered("""
%g: f32[batch,length,8] = xf.activation(%a) {function=gelu}
%c: f32[batch,length,8] = xf.linear(%g, %w, %b)
%s: f32[batch,length,8] = aten.add.Tensor(%c, %x)
%n: f32[batch,length,8] = xf.layer_norm(%s, %b, %b) {eps=1e-05}
%y: f32[batch,length,8] = xf.linear(%n, %w)
return y=%y
""")
    assert kinds["Reshape"] == 2
    assert kinds["Gemm"] == 3
    assert gap < 1e-6


def test_a_broadcast_operand_keeps_the_axes() -> None:
    kinds, gap = lowered("""
%s: f32[batch,length,8] = aten.add.Tensor(%a, %row)
%y: f32[batch,length,8] = xf.linear(%s, %w)
return y=%y
""")
    assert kinds["Reshape"] == 4
    assert gap < 1e-6


def test_a_split_of_the_width_is_no_unfolding() -> None:
    kinds, gap = lowered(
        """
%h: f32[batch,length,2,4] = aten.view(%a) {size=[-1, 7, 2, 4]}
%n: f32[batch,length,2,4] = aten.relu(%h)
%y: f32[batch,length,8] = aten.view(%n) {size=[-1, 7, 8]}
return y=%y
""".replace("7", "%t").replace("%h:", "%t: size[length] = aten.sym_size.int(%x) {dim=1}\n%h:")
    )
    assert kinds["Gemm"] == 1
    assert gap < 1e-6


def test_norms_over_groups_see_the_groups() -> None:
    _, gap = lowered("""
%n: f32[batch,length,8] = xf.rms_norm(%a) {eps=1e-05, groups=2}
%y: f32[batch,length,8] = xf.linear(%n, %w)
return y=%y
""")
    assert gap < 1e-6


def test_a_reduction_over_tokens_is_left_alone() -> None:
    _, gap = lowered("""
%m: f32[batch,1,8] = aten.mean.dim(%a) {dim=[1], keepdim=true}
%d: f32[batch,length,8] = aten.sub.Tensor(%a, %m)
%y: f32[batch,length,8] = xf.linear(%d, %w)
return y=%y
""")
    assert gap < 1e-6
