"""Recurrent operators on ONNX Runtime: as their references, at lengths around a chunk's, with strong decays too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xformopt.lowering import lower
from xformopt.program import Program

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# two heads of width 3 with values of width 5
HEADER = """
program "recurrent" lifted
dim batch in [1, inf]
dim length in [1, inf]
input %q: f32[batch,length,6]
input %k: f32[batch,length,6]
input %v: f32[batch,length,10]
"""
BODIES = {
    "retention": """param %gamma: f32[2]
%size: f32[2] = aten.abs(%gamma)
%decay: f32[2] = aten.mul.Scalar(%size) {other=SLOPE}
%o: f32[batch,length,10] = xf.retention(%q, %k, %v, %decay) {heads=2, scale=0.4}
""",
    "gated linear attention": """%kept: f32[batch,length,6] = aten.abs(%k)
%gate: f32[batch,length,6] = aten.mul.Scalar(%kept) {other=SLOPE}
%o: f32[batch,length,10] = xf.gated_linear_attention(%q, %k, %v, %gate) {heads=2, scale=0.4}
""",
    "delta rule": """%near: f32[batch,length,6] = aten.add.Scalar(%k) {other=2.0}
%unit: f32[batch,length,6] = xf.rms_norm(%near) {eps=1e-6, groups=2}
%key: f32[batch,length,6] = aten.mul.Scalar(%unit) {other=0.5773502691896258}
%two: f32[batch,length,2] = aten.slice.Tensor(%v) {dim=2, end=2}
%half: f32[batch,length,2] = aten.sigmoid(%two)
%beta: f32[batch,length,2] = aten.mul.Scalar(%half) {other=2.0}
%o: f32[batch,length,10] = xf.delta_rule(%q, %key, %v, %beta) {heads=2, scale=0.4}
""",
    "delta rule from a state": """%near: f32[batch,length,6] = aten.add.Scalar(%k) {other=2.0}
%unit: f32[batch,length,6] = xf.rms_norm(%near) {eps=1e-6, groups=2}
%key: f32[batch,length,6] = aten.mul.Scalar(%unit) {other=0.5773502691896258}
%two: f32[batch,length,2] = aten.slice.Tensor(%v) {dim=2, end=2}
%half: f32[batch,length,2] = aten.sigmoid(%two)
%beta: f32[batch,length,2] = aten.mul.Scalar(%half) {other=2.0}
%mean: f32[batch,10] = aten.mean.dim(%v) {dim=[1]}
%heads: f32[batch,2,1,5] = aten.view(%mean) {size=[-1, 2, 1, 5]}
%state: f32[batch,2,3,5] = aten.expand(%heads) {size=[-1, 2, 3, 5]}
%one: (f32[batch,length,10], f32[batch,2,3,5]) = xf.delta_rule_resumed(%q, %key, %v, %beta, %state) {heads=2, scale=0.4}
%out: f32[batch,length,10] = size.getitem(%one, 0)
%left: f32[batch,2,3,5] = size.getitem(%one, 1)
%row: f32[batch,2,5] = aten.mean.dim(%left) {dim=[2]}
%flat: f32[batch,1,10] = aten.view(%row) {size=[-1, 1, 10]}
%o: f32[batch,length,10] = aten.add.Tensor(%out, %flat)
""",
    "ssd": """param %d: f32[2]
%rates: f32[batch,length,2] = aten.slice.Tensor(%v) {dim=2, end=2}
%dt: f32[batch,length,2] = aten.sigmoid(%rates)
param %rate: f32[2]
%size: f32[2] = aten.abs(%rate)
%a: f32[2] = aten.mul.Scalar(%size) {other=SLOPE}
%one: f32[batch,length,10] = xf.ssd(%v, %dt, %a, %q, %k, %d) {heads=2}
%two: f32[batch,length,10] = xf.ssd(%v, %dt, %a, %q, %k) {heads=2, groups=2}
%o: f32[batch,length,10] = aten.add.Tensor(%one, %two)
""",
    "selective scan": """param %d: f32[10]
param %rate: f32[10,6]
%dt: f32[batch,length,10] = aten.sigmoid(%v)
%size: f32[10,6] = aten.abs(%rate)
%a: f32[10,6] = aten.mul.Scalar(%size) {other=SLOPE}
%o: f32[batch,length,10] = xf.selective_scan(%v, %dt, %a, %q, %k, %d)
""",
    "rwkv": """param %u: f32[6]
param %rate: f32[6]
%size: f32[6] = aten.abs(%rate)
%w: f32[6] = aten.mul.Scalar(%size) {other=SLOPE}
%big: f32[batch,length,6] = aten.mul.Scalar(%k) {other=SLOPE}
%mean: f32[batch,length,6] = xf.rwkv(%big, %q, %w, %u)
%o: f32[batch,length,6] = aten.add.Tensor(%mean, %q)
""",
    "rwkv in both directions": """param %u: f32[6]
param %rate: f32[6]
%size: f32[6] = aten.abs(%rate)
%w: f32[6] = aten.mul.Scalar(%size) {other=SLOPE}
%big: f32[batch,length,6] = aten.mul.Scalar(%k) {other=SLOPE}
%mean: f32[batch,length,6] = xf.rwkv(%big, %q, %w, %u) {bidirectional=true}
%one: f32[batch,length,6] = aten.add.Tensor(%mean, %q)
%wide: f32[batch,length,10] = aten.add.Scalar(%v) {other=1.0}
%first: f32[batch,length,6] = aten.slice.Tensor(%wide) {dim=2, end=6}
%o: f32[batch,length,6] = aten.add.Tensor(%one, %first)
""",
    "ssd that is not causal": """param %d: f32[2]
%rates: f32[batch,length,2] = aten.slice.Tensor(%v) {dim=2, end=2}
%dt: f32[batch,length,2] = aten.sigmoid(%rates)
param %rate: f32[2]
%size: f32[2] = aten.abs(%rate)
%a: f32[2] = aten.mul.Scalar(%size) {other=SLOPE}
%one: f32[batch,length,10] = xf.ssd(%v, %dt, %a, %q, %k, %d) {heads=2, causal=false}
%two: f32[batch,length,10] = xf.ssd(%v, %dt, %a, %q, %k) {heads=2, groups=2, causal=false}
%o: f32[batch,length,10] = aten.add.Tensor(%one, %two)
""",
    "causal": """%o: f32[batch,length,10] = xf.linear_attention(%q, %k, %v) {heads=2, causal=true}
""",
    "causal without sum": """%o: f32[batch,length,10] = xf.linear_attention(%q, %k, %v) \
{heads=2, feature=given, causal=true, normalize=false}
""",
    "causal with padding": """%exists: bool[batch,length] = aten.gt.Scalar(%mask) {other=0}
%o: f32[batch,length,10] = xf.linear_attention(%q, %k, %v, %exists) {heads=2, causal=true}
""",
    "positive features": """param %w: f32[2,3,7]
%exists: bool[batch,length] = aten.gt.Scalar(%mask) {other=0}
%o: f32[batch,length,10] = xf.linear_attention(%q, %k, %v, %exists, %w) {heads=2, causal=true, feature=positive}
""",
    "learned features": """param %w: f32[2,3,4]
%one: f32[batch,length,10] = xf.linear_attention(%q, %k, %v, none, %w) {heads=2, causal=true, feature=hedgehog}
%two: f32[batch,length,10] = xf.linear_attention(%q, %k, %v, none, %w) {heads=2, feature=hedgehog}
%o: f32[batch,length,10] = aten.add.Tensor(%one, %two)
""",
    "bidirectional": """%exists: bool[batch,length] = aten.gt.Scalar(%mask) {other=0}
%o: f32[batch,length,10] = xf.linear_attention(%q, %k, %v, %exists) {heads=2}
""",
}


def program(name: str, slope: float) -> Program:
    mask = "input %mask: i64[batch,length]\n" if "%mask" in BODIES[name] else ""
    return Program.parse(HEADER + mask + BODIES[name].replace("SLOPE", str(slope)) + "return o=%o\n")


def inputs(program: Program, batch: int, length: int) -> dict[str, torch.Tensor]:
    found = {name: torch.randn(batch, length, width) for name, width in (("q", 6), ("k", 6), ("v", 10))}
    if "mask" in program.input_names:
        found["mask"] = (torch.arange(length) >= length // 3).long().repeat(batch, 1)
    return found


@pytest.mark.parametrize("slope", [-0.05, -30.0], ids=["mild", "strong"])
@pytest.mark.parametrize("name", BODIES)
def test_runs_as_its_reference(name: str, slope: float) -> None:
    ours = program(name, slope)
    artifact = lower(ours, measure=False)
    for batch, length in ((1, 1), (2, 3), (1, 64), (2, 65), (1, 300)):
        given = inputs(ours, batch, length)
        want = ours.run(given)["o"].numpy()
        have = artifact.run(**{key: value.numpy() for key, value in given.items()})["o"]
        assert have.shape == want.shape
        assert np.isfinite(have).all()
        assert np.linalg.norm(have - want) / np.linalg.norm(want) < 1e-5, (batch, length)
