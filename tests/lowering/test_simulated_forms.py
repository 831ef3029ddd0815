"""Simulated quantizers in ONNX give the very numbers of their references."""

from __future__ import annotations

import pytest
import torch

from xformopt.lowering import lower
from xformopt.program import Program

pytest.importorskip("onnxruntime")

UNIFORM = """
program "uniform" target
dim batch in [1, inf]
input %x: f32[batch,5,12]
param %s: f32[]
param %z: u8[]
param %sc: f32[12]
param %zc: i32[12]
%a: f32[batch,5,12] = xf.fake_quantize(%x, %s, %z) {bits=4}
%b: f32[batch,5,12] = xf.fake_quantize(%x, %sc, %zc) {bits=6}
%c: f32[batch,5,12] = xf.fake_quantize(%x, %s) {bits=3}
%d: f32[batch,5,12] = xf.fake_quantize(%x) {bits=4}
%e: f32[batch,5,12] = xf.fake_quantize(%x) {bits=4, per_token=true}
return a=%a, b=%b, c=%c, d=%d, e=%e
"""

LOGARITHMIC = """
program "logarithmic" target
dim batch in [1, inf]
input %x: f32[batch,5,12]
param %s: f32[]
%a: f32[batch,5,12] = xf.log_quantize(%x, %s) {bits=4, numerator=1, denominator=1}
%b: f32[batch,5,12] = xf.log_quantize(%x, %s) {bits=4, numerator=1, denominator=2, flush=false}
%c: f32[batch,5,12] = xf.log_quantize(%x, %s) {bits=3, numerator=52, denominator=37, round_table=true}
return a=%a, b=%b, c=%c
"""
HALVES = """
program "halves" target
dim batch in [1, inf]
dim t in [1, 64]
input %q: f32[batch,t,32]
input %k: f32[batch,7,16]
input %v: f32[batch,7,12]
input %mask: bool[batch,7]
%w: f32[batch,4,t,7] = xf.attention_weights(%q, %k, %mask) {heads=4, kv_heads=2, scale=0.3, causal=true, window_left=2}
%y: f32[batch,t,24] = xf.attention_values(%w, %v) {heads=4, kv_heads=2}
%z: f32[batch,t,24] = xf.attention(%q, %k, %v, %mask) {heads=4, kv_heads=2, scale=0.3, causal=true, window_left=2}
return w=%w, y=%y, z=%z
"""


def check(program: Program, x: torch.Tensor) -> None:
    artifact = lower(program, measure=False)
    wanted = program.run({"x": x})
    for name, found in artifact.run(x=x.numpy()).items():
        assert torch.equal(torch.from_numpy(found), wanted[name]), name


def test_uniform() -> None:
    generator = torch.Generator().manual_seed(3)
    parameters = {
        "s": torch.tensor(0.21),
        "z": torch.tensor(7, dtype=torch.uint8),
        "sc": torch.rand(12, generator=generator) / 4 + 0.01,
        "zc": torch.randint(-9, 70, (12,), generator=generator, dtype=torch.int32),
    }
    program = Program.parse(UNIFORM, parameters=parameters)
    x = torch.randn(3, 5, 12, generator=generator) * 3
    x[1] = 0
    check(program, x)
    execution = lower(program, measure=False).manifest.execution
    assert execution == {
        "activations in 3 bits, simulated in float": 1,
        "activations in 4 bits, simulated in float": 3,
        "activations in 6 bits, simulated in float": 1,
    }


def test_logarithmic() -> None:
    program = Program.parse(LOGARITHMIC, parameters={"s": torch.tensor(0.8)})
    x = torch.rand(64, 5, 12, generator=torch.Generator().manual_seed(4)) ** 3
    x[0, 0, :3] = torch.tensor([0.0, -1.0, 2.0])
    check(program, x)


def test_attention_in_two_halves() -> None:
    program = Program.parse(HALVES)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, :5] = False
    inputs = {name: torch.randn(3, 5 if name == "q" else 7, w) for name, w in (("q", 32), ("k", 16), ("v", 12))}
    inputs["mask"] = mask
    wanted = program.run(inputs)
    assert torch.equal(wanted["y"], wanted["z"])
    assert float(wanted["w"][1].sum(-1).amin()) == 0
    found = lower(program, measure=False).run(**{name: value.numpy() for name, value in inputs.items()})
    for name in ("w", "y"):
        torch.testing.assert_close(torch.from_numpy(found[name]), wanted[name], rtol=2e-6, atol=2e-6)
