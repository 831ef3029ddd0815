"""Layers of E4M3 by E4M3 on GPUs: merged where tensor cores multiply it, and said to be what they are."""

from __future__ import annotations

import pytest
import torch
from interpreted import relative

from xformopt.lowering.manifest import execution_of, precision_of
from xformopt.lowering.reference import reference_inputs
from xformopt.lowering.triton_export import export_kernels
from xformopt.lowering.triton_float8 import multiply_in_float8
from xformopt.passes.quantize.convert_precision import ConvertPrecision
from xformopt.passes.quantize.quantize_float import QuantizeFloat
from xformopt.pipeline import Context
from xformopt.program import Program

TEXT = """
program "layer" lifted
dim rows in [1, 64]
input %x: f32[rows,64]
param %up.w: f32[48,64]
param %up.b: f32[48]
%u: f32[rows,48] = xf.linear(%x, %up.w, %up.b)  # up
%y: f32[rows,48] = aten.relu(%u)  # act
return y=%y
"""
ROUNDED = QuantizeFloat(format="fp8_e4m3", activations="fp8_e4m3", group=0, scale="fp16")
HALVES = ConvertPrecision(to="bf16")


def quantized(*passes: QuantizeFloat | ConvertPrecision) -> Program:
    program = Program.parse(TEXT)
    for one in passes:
        program = one.run(program, Context()).program
    return program


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.nodes()]


@pytest.mark.parametrize("passes", [(ROUNDED,), (ROUNDED, HALVES), (HALVES, ROUNDED)])
def test_a_layer_whose_factors_are_both_e4m3_is_one_operator(passes: tuple[QuantizeFloat | ConvertPrecision]) -> None:
    before = quantized(*passes)
    after = multiply_in_float8(before, (9, 0))
    assert "xf.float8_linear.default" in operators(after)
    assert not {"xf.float_weight_linear.default", "xf.fake_quantize_float.default"} & set(operators(after))
    assert Program.parse(str(after)).fingerprint
    inputs = reference_inputs(before, {"rows": 7}, seed=1)
    # in halves, a value between two codes may be rounded to either
    allowed = 3e-2 if HALVES in passes else 1e-6
    assert relative(after.run(inputs)["y"], before.run(inputs)["y"]) < allowed
    assert execution_of(after, by_kernels=True) == {"linear layers executed in fp8_e4m3": 1}
    assert precision_of(after) == "fp8-weights"
    # the original is as it was
    assert "xf.float_weight_linear.default" in operators(before)


def test_its_kernel_is_in_the_exported_program() -> None:
    program = multiply_in_float8(quantized(ROUNDED), (9, 0))
    ready = export_kernels(program, device="cpu")
    assert ready.forms["float8_linear"] == {"kernel": 1}
    inputs = reference_inputs(program, {"rows": 7}, seed=1)
    with torch.no_grad():
        (found,) = ready.exported.module()(inputs["x"])
    assert relative(found, program.run(inputs)["y"]) < 1e-3


def test_elsewhere_weights_are_stored_and_rounding_is_simulated() -> None:
    before = quantized(ROUNDED)
    assert multiply_in_float8(before, (8, 0)) is before
    assert export_kernels(before, device="cpu").forms["float_weight_linear"] == {"kernel": 1}
    assert execution_of(before, by_kernels=True) == {
        "activations in fp8_e4m3, simulated in float": 1,
        "linear layers stored in fp8_e4m3, made floats at every call, computed in float": 1,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"format": "fp8_e4m3", "activations": "fp8_e5m2"},
        {"format": "fp8_e5m2", "activations": "fp8_e4m3"},
        {"format": "fp4_e2m1", "activations": "fp8_e4m3"},
        {"format": "fp8_e4m3"},
        {"format": "fp8_e4m3", "activations": "fp8_e4m3", "group": 16},
    ],
)
def test_other_layers_stay(options: dict[str, object]) -> None:
    before = quantized(QuantizeFloat(**{"group": 32, **options}))  # type: ignore[arg-type]
    assert multiply_in_float8(before, (9, 0)) is before
