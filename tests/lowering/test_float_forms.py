"""Low-bit floating point in ONNX: the numbers of the references, and a matrix that is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xformopt.kernels.float_formats import FORMATS, pack_floats
from xformopt.lowering import lower
from xformopt.program import Program

ort = pytest.importorskip("onnxruntime")

SCALES = {"powers": "%powers", "halves": "%halves", "codes": "%codes, %base"}
OUTPUTS = {
    **{
        f"{name}_{kind}": f"f32[batch,5,40] = xf.float_weight_linear(%x, %{name}, {scale}) {{format={name}}}"
        for name in FORMATS
        for kind, scale in SCALES.items()
    },
    "biased": "f32[batch,5,40] = xf.float_weight_linear(%x, %fp4_e2m1, %powers, none, %bias) {format=fp4_e2m1}",
    "both": "f32[batch,5,40] = xf.float8_linear(%x, %fp8_e4m3, %powers, none, %bias)",
    **{f"{name}_rounded": f"f32[batch,5,96] = xf.fake_quantize_float(%x) {{format={name}}}" for name in FORMATS},
}
TEXT = "\n".join(
    [
        'program "floats" target',
        "dim batch in [1, inf]",
        "input %x: f32[batch,5,96]",
        *(f"param %{name}: u8[40,3,{4 * found.bits}]" for name, found in FORMATS.items()),
        "param %powers: u8[40,3]",
        "param %codes: u8[40,3]",
        "param %halves: f16[40,3]",
        "param %base: f32[]",
        "param %bias: f32[40]",
        *(f"%{name}: {body}" for name, body in OUTPUTS.items()),
        "return " + ", ".join(f"{name}=%{name}" for name in OUTPUTS),
    ]
)


@pytest.fixture(scope="module")
def program() -> Program:
    generator = torch.Generator().manual_seed(5)

    def drawn(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    parameters = {"powers": drawn(20, 40, 3) + 115, "codes": drawn(126, 40, 3) + 1, "base": torch.tensor(0.37)}
    parameters["halves"] = torch.rand(40, 3, generator=generator).half()
    parameters["bias"] = torch.randn(40, generator=generator)
    for name, found in FORMATS.items():
        finite = 2 ** (found.bits - 1) - found.unused
        codes = drawn(finite, 40, 3, 32) | drawn(2, 40, 3, 32) << (found.bits - 1)
        parameters[name] = pack_floats(codes, found.bits)
    return Program.parse(TEXT, parameters=parameters)


def test_forms_match_the_references(program: Program) -> None:
    artifact = lower(program, measure=False)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1)) * 3
    x[1, 1] = 0
    wanted = program.run({"x": x})
    for name, found in artifact.run(x=x.numpy()).items():
        torch.testing.assert_close(torch.from_numpy(found), wanted[name], rtol=1e-6, atol=0, msg=name)


def test_the_artifact_says_what_is_stored_and_what_is_simulated(program: Program) -> None:
    manifest = lower(program, measure=False).manifest
    assert manifest.precision == "fp4-weights"
    stored = "linear layers stored in {}, made floats at load, computed in float"
    assert manifest.execution == {
        **{stored.format(name): 3 + (name == "fp4_e2m1") for name in FORMATS},
        **{f"activations in {name}, simulated in float": 1 for name in FORMATS},
        "linear layers in fp8_e4m3, simulated in float": 1,
    }


def test_onnx_runtime_makes_the_matrix_when_it_loads_the_model(program: Program, tmp_path: Path) -> None:
    only = program.copy(outputs=program.outputs[:1])
    only.output_node.args = (only.results[:1],)
    lower(only.drop_unused(), measure=False).save(tmp_path / "artifact")
    (model,) = (tmp_path / "artifact").rglob("*.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    import onnx

    left = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert left <= {"MatMul", "Gemm", "FusedMatMul", "Reshape"}
