"""Operators beside softmax attention on ONNX Runtime: as their references, at odd lengths and with padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.analysis import cost
from xformopt.errors import LoweringError
from xformopt.kernels.definition import load_operators
from xformopt.lowering.onnx_export import Exported, export_onnx
from xformopt.lowering.onnx_forms import build_graph, offered_forms
from xformopt.program import Program

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# two heads of width 3 with values of width 5
HEADER = """
program "variants" lifted
dim batch in [1, inf]
dim length in [1, 320]
input %q: f32[batch,length,6]
input %k: f32[batch,length,6]
input %v: f32[batch,length,10]
input %mask: bool[batch,length]
"""
OUT = "f32[batch,length,10]"
SIZES = ((1, 1), (3, 7), (2, 65), (1, 130))
BODIES = {
    "local_attention": f"""
%o0: {OUT} = xf.local_attention(%q, %k, %v) {{heads=2, scale=0.7, window_left=3, window_right=2}}
%o1: {OUT} = xf.local_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, window_left=40, causal=true}}
%o2: {OUT} = xf.local_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, window_left=2, window_right=1, dilation=3}}
%o3: {OUT} = xf.local_attention(%q, %k, %v) {{heads=2, scale=0.7, window_left=2, window_right=1, dilation=2, stripe=5}}
%o4: {OUT} = xf.local_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, window_left=4, stripe=3, causal=true}}
%qt: f32[batch,6,length] = aten.transpose.int(%q) {{dim0=1, dim1=2}}
%b0: f32[batch,length,length] = aten.matmul.default(%q, %qt)
%b1: f32[batch,1,length,length] = aten.unsqueeze.default(%b0) {{dim=1}}
%b2: f32[batch,2,length,length] = aten.cat.default([%b1, %b1]) {{dim=1}}
%o5: {OUT} = xf.local_attention(%q, %k, %v, %mask, %b1) {{heads=2, scale=0.7, window_left=3, window_right=20}}
%o6: {OUT} = xf.local_attention(%q, %k, %v, none, %b2) {{heads=2, scale=0.7, window_left=9, causal=true}}
""",
    "block_sparse_attention": f"""
param %one: bool[1,20,20]
param %each: bool[2,20,20]
param %none: bool[1,20,20]
%qt: f32[batch,6,length] = aten.transpose.int(%q) {{dim0=1, dim1=2}}
%o0: {OUT} = xf.block_sparse_attention(%q, %k, %v, %one) {{heads=2, scale=0.7, block=16}}
%o1: {OUT} = xf.block_sparse_attention(%q, %k, %v, %each, %mask) {{heads=2, scale=0.7, block=16}}
%o2: {OUT} = xf.block_sparse_attention(%q, %k, %v, %each) {{heads=2, scale=0.7, block=16, causal=true}}
%o3: {OUT} = xf.block_sparse_attention(%q, %k, %v, %one, %mask) {{heads=2, scale=0.7, block=16, causal=true}}
%o4: {OUT} = xf.block_sparse_attention(%q, %k, %v, %none) {{heads=2, scale=0.7, block=16}}
%b0: f32[batch,length,length] = aten.matmul.default(%q, %qt)
%b1: f32[batch,1,length,length] = aten.unsqueeze.default(%b0) {{dim=1}}
%b2: f32[batch,2,length,length] = aten.cat.default([%b1, %b1]) {{dim=1}}
%o5: {OUT} = xf.block_sparse_attention(%q, %k, %v, %each, %mask, %b1) {{heads=2, scale=0.7, block=16}}
%o6: {OUT} = xf.block_sparse_attention(%q, %k, %v, %each, none, %b2) {{heads=2, scale=0.7, block=16, causal=true}}
%o7: {OUT} = xf.block_sparse_attention(%q, %k, %v, %one, none, %b2) {{heads=2, scale=0.7, block=16}}
""",
    "mra_attention": f"""
%qt: f32[batch,6,length] = aten.transpose.int(%q) {{dim0=1, dim1=2}}
%b0: f32[batch,length,length] = aten.matmul.default(%q, %qt)
%b1: f32[batch,1,length,length] = aten.unsqueeze.default(%b0) {{dim=1}}
%b2: f32[batch,2,length,length] = aten.cat.default([%b1, %b1]) {{dim=1}}
%o0: {OUT} = xf.mra_attention(%q, %k, %v) {{heads=2, scale=0.7, block=16, keep=0.3}}
%o1: {OUT} = xf.mra_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, block=16, keep=0.3, causal=true}}
%o2: {OUT} = xf.mra_attention(%q, %k, %v, %mask, %b1) {{heads=2, scale=0.7, block=16, keep=0.5}}
%o3: {OUT} = xf.mra_attention(%q, %k, %v, none, %b2) {{heads=2, scale=0.7, block=16, keep=0.5, coarse=false}}
""",
    "combiner_attention": f"""
%o0: {OUT} = xf.combiner_attention(%q, %k, %v) {{heads=2, scale=0.7, block=16}}
%o1: {OUT} = xf.combiner_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, block=16, causal=true}}
%o2: {OUT} = xf.combiner_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, block=7}}
""",
    "prob_sparse_attention": f"""
param %at: f32[9]
%qt: f32[batch,6,length] = aten.transpose.int(%q) {{dim0=1, dim1=2}}
%b0: f32[batch,length,length] = aten.matmul.default(%q, %qt)
%b1: f32[batch,1,length,length] = aten.unsqueeze.default(%b0) {{dim=1}}
%b2: f32[batch,2,length,length] = aten.cat.default([%b1, %b1]) {{dim=1}}
%o0: {OUT} = xf.prob_sparse_attention(%q, %k, %v, %at) {{heads=2, scale=0.7, factor=2.0}}
%o1: {OUT} = xf.prob_sparse_attention(%q, %k, %v, %at, %mask) {{heads=2, scale=0.7, factor=5.0, causal=true}}
%o2: {OUT} = xf.prob_sparse_attention(%q, %k, %v, %at, %mask, %b1) {{heads=2, scale=0.7, factor=5.0}}
%o3: {OUT} = xf.prob_sparse_attention(%q, %k, %v, %at, none, %b2) {{heads=2, scale=0.7, factor=3.0, causal=true}}
""",
    "routing_attention": f"""
param %mu: f32[2,5,3]
%qt: f32[batch,6,length] = aten.transpose.int(%q) {{dim0=1, dim1=2}}
%b0: f32[batch,length,length] = aten.matmul.default(%q, %qt)
%b1: f32[batch,1,length,length] = aten.unsqueeze.default(%b0) {{dim=1}}
%b2: f32[batch,2,length,length] = aten.cat.default([%b1, %b1]) {{dim=1}}
%o0: {OUT} = xf.routing_attention(%q, %k, %v, %mu) {{heads=2, scale=0.7}}
%o1: {OUT} = xf.routing_attention(%q, %k, %v, %mu, %mask) {{heads=2, scale=0.7, causal=true}}
%o2: {OUT} = xf.routing_attention(%q, %k, %v, %mu, %mask, %b1) {{heads=2, scale=0.7}}
%o3: {OUT} = xf.routing_attention(%q, %k, %v, %mu, none, %b2) {{heads=2, scale=0.7, causal=true}}
""",
    "entmax_attention": f"""
%o0: {OUT} = xf.entmax_attention(%q, %k, %v) {{heads=2, scale=0.7}}
%o1: {OUT} = xf.entmax_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, alpha=1.25}}
%o2: {OUT} = xf.entmax_attention(%q, %k, %v, %mask) {{heads=2, scale=0.7, alpha=2.0, causal=true}}
%o3: {OUT} = xf.entmax_attention(%q, %k, %v) {{heads=2, scale=0.01, alpha=1.75, causal=true}}
""",
    "flow_attention": f"""
%o0: {OUT} = xf.flow_attention(%q, %k, %v) {{heads=2}}
%o1: {OUT} = xf.flow_attention(%q, %k, %v, %mask, %mask) {{heads=2}}
%o2: {OUT} = xf.flow_attention(%q, %k, %v) {{heads=2, causal=true}}
%o3: {OUT} = xf.flow_attention(%q, %k, %v, %mask, %mask) {{heads=2, causal=true}}
""",
    "windowed_linear_attention": f"""
param %gain: f32[2]
param %w: f32[2,3,4]
%o0: {OUT} = xf.windowed_linear_attention(%q, %k, %v, %gain, none, %w) {{heads=2, scale=0.7, window=5, causal=true}}
%o1: {OUT} = xf.windowed_linear_attention(%q, %k, %v, %gain, %mask, %w) {{heads=2, scale=0.7, window=20, causal=true}}
%o2: {OUT} = xf.windowed_linear_attention(%q, %k, %v, %gain, %mask, %w) {{heads=2, scale=0.7, window=17}}
%o3: {OUT} = xf.windowed_linear_attention(%q, %k, %v, %gain) {{heads=2, scale=90.0, window=64, feature=elu}}
""",
    "prefix_scan_attention": f"""
param %query: f32[6]
%o0: {OUT} = xf.prefix_scan_attention(%query, %k, %v) {{heads=2, scale=0.7}}
%o1: {OUT} = xf.prefix_scan_attention(%query, %k, %v, %mask) {{heads=2, scale=30.0}}
""",
    "toeplitz_attention": f"""
param %bias: f32[2,639]
param %w: f32[2,3,8]
%plus: f32[batch,length,6] = aten.abs(%q)
%o0: {OUT} = xf.toeplitz_attention(%q, %k, %v, %bias, none, %w) {{heads=2}}
%o1: {OUT} = xf.toeplitz_attention(%q, %k, %v, %bias, %mask, %w) {{heads=2, causal=true}}
%o2: {OUT} = xf.toeplitz_attention(%plus, %plus, %v, %bias, %mask) {{heads=2}}
""",
    "xca": """
param %t: f32[2]
%o0: f32[batch,length,6] = xf.xca(%q, %k, %k, %t) {heads=2}
%o1: f32[batch,length,6] = xf.xca(%q, %k, %k, %t, %mask) {heads=2}
%o2: f32[batch,length,6] = xf.xca(%q, %k, %k, %t, %mask) {heads=2, top=2}
""",
}


def block_masks() -> dict[str, torch.Tensor]:
    """Return masks of 20 x 20 blocks whose rows keep none, few, many or all."""
    generator = torch.Generator().manual_seed(3)
    density = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat(5)[:, None]
    one, each = (torch.rand(n, 20, 20, generator=generator) < density for n in (1, 2))
    return {"one": one, "each": each, "none": torch.zeros(1, 20, 20, dtype=torch.bool)}


def program(name: str) -> Program:
    given = {"block_sparse_attention": block_masks(), "prob_sparse_attention": {"at": torch.arange(9) / 9}}
    parameters = given.get(name)
    body = BODIES[name]
    outputs = [line.split(":")[0] for line in body.splitlines() if line.startswith("%o")]
    unused = "" if "%mask" in body else "input %mask: bool[batch,length]\n"
    returned = ", ".join(f"{value[1:]}={value}" for value in outputs)
    return Program.parse(HEADER.replace(unused, "") + body + f"return {returned}\n", parameters=parameters)


def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    found = {name: torch.randn(batch, length, width) for name, width in (("q", 6), ("k", 6), ("v", 10))}
    mask = torch.rand(batch, length) > 0.3
    if batch > 1:
        mask[1] = False  # a sequence of nothing
        mask[0] = torch.arange(length) >= length // 3  # left padding
    return {**found, "mask": mask}


def open_session(exported: Exported, choice: dict[str, str]) -> Any:
    import onnx_ir as ir

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    blob = ir.serde.serialize_model(build_graph(exported, choice).model).SerializeToString()
    return ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])


def run(exported: Exported, given: dict[str, torch.Tensor]) -> list[np.ndarray]:
    return open_session(exported, {}).run(None, {name: value.numpy() for name, value in given.items()})


def check(exported: Exported, choice: dict[str, str]) -> None:
    session = open_session(exported, choice)
    known = {value.name for value in session.get_inputs()}
    for batch, length in SIZES:
        given = {name: value for name, value in inputs(batch, length).items() if name in known}
        expected = exported.program.run(given)
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        for name, have in zip(exported.program.output_names, found, strict=True):
            want = expected[name].numpy()
            assert have.shape == want.shape
            assert np.isfinite(have).all()
            gap = np.linalg.norm(have - want) / max(np.linalg.norm(want), 1e-6)
            assert gap < 1e-5, f"{name} at {batch} x {length}: {gap}"


@pytest.mark.parametrize("name", BODIES)
def test_every_form_runs_as_the_reference(name: str) -> None:
    exported = export_onnx(program(name))
    operator = name.split(",")[0]
    assert operator in load_operators()
    for form in (None, *offered_forms(exported).get(operator, ())):
        check(exported, {} if form is None else {operator: form})


GRID = """
program "grid" lifted
dim batch in [1, inf]
input %q: f32[batch,35,6]
input %k: f32[batch,35,6]
input %v: f32[batch,35,10]
param %rate: f32[2]
%size: f32[2] = aten.abs(%rate)
%decay: f32[2] = aten.neg(%size)
%o0: f32[batch,35,10] = xf.manhattan_attention(%q, %k, %v, %decay) {heads=2, scale=0.7, rows=5, columns=7}
%o1: f32[batch,35,10] = xf.manhattan_attention(%q, %k, %v, %decay) \
{heads=2, scale=0.7, rows=5, columns=7, decomposed=true}
return o0=%o0, o1=%o1
"""


def test_manhattan_attention_runs_as_the_reference() -> None:
    exported = export_onnx(Program.parse(GRID))
    found = run(exported, grid := {key: value for key, value in inputs(3, 35).items() if key != "mask"})
    for name, have in zip(("o0", "o1"), found, strict=True):
        np.testing.assert_allclose(have, exported.program.run(grid)[name].numpy(), rtol=1e-4, atol=1e-5)


BAND = """
program "band" lifted
dim batch in [1, inf]
input %q: f32[batch,100,6]
input %k: f32[batch,70,6]
input %v: f32[batch,70,10]
param %mask: bool[1,7,5]
%o: f32[batch,100,10] = xf.block_sparse_attention(%q, %k, %v, %mask) {heads=2, scale=0.7, block=16}
return o=%o
"""


def test_block_sparse_attention_computes_only_blocks_that_are_kept() -> None:
    mask = torch.eye(7, 5, dtype=torch.bool)[None]
    exported = export_onnx(Program.parse(BAND, parameters={"mask": mask}))
    model = build_graph(exported, {}).model
    tables = [v.const_value.numpy() for v in model.graph.initializers.values() if "int64.5x1." in (v.name or "")]
    assert [table.reshape(-1).tolist() for table in tables] == [[0, 1, 2, 3, 4]]
    given = {"q": torch.randn(2, 100, 6), "k": torch.randn(2, 70, 6), "v": torch.randn(2, 70, 10)}
    found = run(exported, given)[0]
    np.testing.assert_allclose(found, exported.program.run(given)["o"].numpy(), atol=1e-5)
    # what no block is kept for
    assert not found[:, 80:].any()


EVEN = """
program "even" lifted
dim batch in [1, inf]
input %q: f32[batch,32,6]
input %k: f32[batch,32,6]
input %v: f32[batch,32,10]
input %bias: f32[1,2,32,32]
param %mask: bool[2,SIZE,SIZE]
%o: f32[batch,32,10] = xf.block_sparse_attention(%q, %k, %v, %mask) {heads=2, scale=0.7, block=BLOCK}
%b: f32[batch,32,10] = xf.block_sparse_attention(%q, %k, %v, %mask, none, %bias) {heads=2, scale=0.7, block=BLOCK}
return o=%o, b=%b
"""


@pytest.mark.parametrize("blocks", [1, 2])
def test_heads_whose_rows_all_keep_as_many_blocks_stay_apart(blocks: int) -> None:
    # one product holds the rows of both heads, by rows first
    mask = torch.stack([torch.eye(blocks), torch.eye(blocks).flip(0)]).bool()
    text = EVEN.replace("SIZE", str(blocks)).replace("BLOCK", str(32 // blocks))
    exported = export_onnx(Program.parse(text, parameters={"mask": mask}))
    given = {"q": torch.randn(2, 32, 6), "k": torch.randn(2, 32, 6), "v": torch.randn(2, 32, 10)}
    given["bias"] = torch.randn(1, 2, 32, 32)
    expected = exported.program.run(given)
    for name, found in zip(("o", "b"), run(exported, given), strict=True):
        np.testing.assert_allclose(found, expected[name].numpy(), atol=1e-5)


def test_a_block_mask_known_at_run_time_only_is_refused() -> None:
    text = BAND.replace("param %mask", "input %mask")
    with pytest.raises(LoweringError, match="its block mask is computed at run time"):
        build_graph(export_onnx(Program.parse(text)), {})


@pytest.mark.parametrize("name", BODIES)
def test_forms_are_blocks_and_not_steps(name: str) -> None:
    # as many nodes however long the sequence, and no loop
    model = build_graph(export_onnx(program(name)), {}).model
    count = BODIES[name].count("= xf.")
    assert len(list(model.graph)) < 350 * count
    assert not [node for node in model.graph if node.op_type in ("Loop", "If")]


def test_block_sparse_attention_costs_what_its_mask_keeps() -> None:
    mask = torch.eye(7, 5, dtype=torch.bool)[None]
    program = Program.parse(BAND, parameters={"mask": mask})
    assert cost(program, {"batch": 2}).flops == 2 * 2 * 2 * 5 * 16 * 16 * (3 + 5)
