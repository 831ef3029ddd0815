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
