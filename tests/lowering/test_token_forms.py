"""Every ONNX form of the operators that shorten sequences, at fixed and varying lengths, with and without padding."""

from __future__ import annotations

import operator as builtin
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lowering.onnx_export import Exported, export_onnx
from xformopt.lowering.onnx_forms import build_graph, forms_of
from xformopt.program import Output, Program
from xformopt.rewrite import Editor

ort = pytest.importorskip("onnxruntime")

INPUTS = """
program "cases" lifted
dim batch in [1, inf]
{dim}input %x: f32[batch,{length},24]
input %q: f32[batch,{length},32]
input %k: f32[batch,{length},32]
input %k2: f32[batch,{length},16]
input %scores: f32[batch,{length}]
input %real: bool[batch,{length}]
input %ranks: i64[9] below 9
%sizes: f32[batch,{length}] = aten._to_copy(%real) {{dtype=f32}}
return sizes=%sizes
"""
OPERATORS = (
    "match_tokens",
    "merge_tokens",
    "restore_tokens",
    "select_tokens",
    "rank_tokens",
    "changed_tokens",
    "update_tokens",
    "attention_received",
    "transform_tokens",
)
SHORT = {"varying": ((1, 22), (3, 31)), "fixed": ((1, 22), (3, 22))}


class Cases:
    """Calls every operator in every way, and returns what is a number."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values = {node.name: node for node in program.graph.nodes}
        self.returned: list[fx.Node] = []
        self.editor = Editor(program).at(program.output_node)

    def call(self, target: Any, *args: Any, parts: int = 1, **options: Any) -> list[fx.Node]:
        node = self.editor.call(target, *args, **options)
        return [node] if parts == 1 else [self.editor.call(builtin.getitem, node, i) for i in range(parts)]

    def add(self, r: int) -> None:
        x, q, k, k2, scores, real, sizes = (self.values[n] for n in ("x", "q", "k", "k2", "scores", "real", "sizes"))
        for prefix, own in ((1, None), (0, sizes), (1, sizes), (2, None)):
            gone = {"r": r + 3 * (prefix == 2)}
            pairs = self.call(xf.match_tokens, k, own, heads=4, prefix=prefix, **gone, parts=3)
            tokens, total = self.call(xf.merge_tokens, x, *pairs, own, parts=2)
            self.returned += [tokens, total, *self.call(xf.restore_tokens, tokens, *pairs)]
            (kept,) = self.call(xf.rank_tokens, scores, prefix=prefix, **gone)
            self.returned += self.call(xf.select_tokens, x, kept)
            mixing = {"prefix": prefix, "neighbours": 2, "temperature": 0.2}
            self.returned += self.call(xf.transform_tokens, k, scores, own, **mixing, **gone, parts=2)
        (changed,) = self.call(xf.changed_tokens, q, k, self.values["ranks"])
        (rows,) = self.call(xf.select_tokens, q, changed)
        self.returned += self.call(xf.update_tokens, k, changed, rows)
        for keys, kv_heads in ((k, 4), (k2, 2)):
            for mask, log_size, first in ((None, None, 1), (real, None, 0), (real, scores, 1), (None, scores, 0)):
                heads = {"heads": 4, "kv_heads": kv_heads, "scale": 0.3, "first": first}
                self.returned += self.call(xf.attention_received, q, keys, mask, log_size, **heads)

    def finish(self) -> Program:
        self.program.output_node.args = (tuple(self.returned),)
        self.program.outputs = tuple(Output(f"o{i}") for i in range(len(self.returned)))
        return self.program.drop_unused()


@pytest.fixture(scope="module", params=["varying", "fixed"])
def exported(request: pytest.FixtureRequest) -> tuple[str, Exported]:
    varies = request.param == "varying"
    dim, length = ("dim length in [22, 64]\n", "length") if varies else ("", "22")
    cases = Cases(Program.parse(INPUTS.format(dim=dim, length=length)))
    cases.add(7)
    return request.param, export_onnx(cases.finish())


def draw(program: Program, batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + length)
    sizes = {"batch": batch, "length": length}
    drawn = {"ranks": torch.tensor([4, 0, 3, 1, 8, 2, 7, 5, 6])}
    for spec in program.inputs:
        if spec.name in drawn:
            continue
        shape = [sizes[s] if isinstance(s, str) else s for s in spec.shape]
        drawn[spec.name] = torch.randn(shape, generator=generator)
    real = torch.ones(batch, length, dtype=torch.bool)
    real[-1, 1 + length // 2 :] = False
    return drawn | {"real": real}


@pytest.mark.parametrize(("name", "form"), [(name, form.name) for name in OPERATORS for form in forms_of(name)])
def test_forms_match_the_reference(exported: tuple[str, Exported], name: str, form: str) -> None:
    kind, export = exported
    built = build_graph(export, {name: form}, standard_only=True)
    assert form in built.forms[name]
    assert {node.domain for node in built.model.graph} == {""}
    import onnx_ir as ir

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    blob = ir.serde.serialize_model(built.model).SerializeToString()
    session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    for batch, length in SHORT[kind]:
        inputs = draw(export.program, batch, length)
        expected = export.program.run(inputs)
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for output, value in zip(export.program.output_names, found, strict=True):
            want = expected[output].numpy()
            assert value.shape == want.shape, (output, batch, length)
            np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-6, err_msg=f"{output} at {batch} x {length}")
