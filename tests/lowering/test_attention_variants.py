"""Operators beside softmax attention on ONNX Runtime: as their references, at odd lengths and with padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
""",
    "xca": """
param %t: f32[2]
%o0: f32[batch,length,6] = xf.xca(%q, %k, %k, %t) {heads=2}
%o1: f32[batch,length,6] = xf.xca(%q, %k, %k, %t, %mask) {heads=2}
""",
}


def program(name: str, parameters: dict[str, torch.Tensor] | None = None) -> Program:
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


def check(exported: Exported, choice: dict[str, str]) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    import onnx_ir as ir

    model = build_graph(exported, choice).model
    blob = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
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


@pytest.mark.parametrize("name", BODIES)
def test_forms_are_blocks_and_not_steps(name: str) -> None:
    # a few dozen nodes an operator, however long the sequence, and no loop
    model = build_graph(export_onnx(program(name)), {}).model
    count = BODIES[name].count("= xf.")
    assert len(list(model.graph)) < 120 * count
    assert not [node for node in model.graph if node.op_type in ("Loop", "If")]
