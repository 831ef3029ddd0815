"""TVM artifacts compute what the program computes, at the sizes they were compiled for, and refuse others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xformopt.api import export
from xformopt.cli.options import the_sizes
from xformopt.errors import ArtifactError, DataError, LoweringError, UsageError
from xformopt.evaluation import artifact_subject
from xformopt.kernels.attention.tvm import Sizes
from xformopt.kernels.linear.tvm import pack
from xformopt.lowering import load, lower, open_runner, tvm_build, tvm_trace
from xformopt.lowering.artifact import Artifact
from xformopt.lowering.reference import reference_inputs
from xformopt.lowering.tvm_signature import Batching, read_signature
from xformopt.measure.machine import describe_machine
from xformopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from xformopt.passes.quantize.quantize_static import QuantizeStatic
from xformopt.pipeline import Pass, Pipeline
from xformopt.program import Program

pytest.importorskip("tvm")

# odd sizes: rows that no tile divides, columns that no panel divides
SIZES = {"batch": 2, "length": 9}


@pytest.fixture(scope="module")
def folder(encoder: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tvm") / "artifact"
    lower(encoder, "tvm-cpu", sizes=SIZES, captured=encoder).save(path)
    return path


def arrays_of(program: Program, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in reference_inputs(program, sizes, seed=3).items()}


def test_the_loaded_artifact_computes_the_program(encoder: Program, folder: Path) -> None:
    arrays = arrays_of(encoder, SIZES)
    # keys that padding hides
    arrays["mask"][1, 5:] = 0
    expected = encoder.run({name: torch.from_numpy(value) for name, value in arrays.items()})
    found = load(folder, threads=1).run(**arrays)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5)


def test_kernels_took_what_they_can(folder: Path) -> None:
    manifest = json.loads((folder / "artifact.json").read_text())
    assert manifest["forms"] == {
        "attention": {"kernel": 1},
        "layer_norm": {"kernel": 1},
        "linear": {"kernel": 3},
        "linear_activation": {"kernel": 1},
    }
    assert {dim["name"]: (dim["low"], dim["high"]) for dim in manifest["dims"]} == {"batch": (2, 2), "length": (9, 9)}


@pytest.mark.parametrize(("target", "static"), [("tvm-cpu", False), ("tvm-x86-64-v3", True)])
def test_integer_products(encoder: Program, target: str, static: bool) -> None:
    """Layers of 8-bit integers run as such, whether their range is calibrated or taken."""
    if not tvm_build.runs_here(target):
        pytest.skip("needs AVX2")  # the library is made for it, and another processor stops at its first instruction
    quantize: Pass = QuantizeStatic() if static else QuantizeDynamic()
    batches = [reference_inputs(encoder, SIZES, seed=seed) for seed in range(2)]
    program = Pipeline([quantize]).run(encoder, calibration=batches).program
    artifact = lower(program, target, sizes=SIZES, measure=False)
    assert artifact.manifest.forms["quantized_linear"] == {"kernel": 4}
    assert artifact.manifest.precision == "int8"
    arrays = arrays_of(encoder, SIZES)
    expected = program.run({name: torch.from_numpy(value) for name, value in arrays.items()})
    found = artifact.run(**arrays)
    for name, value in expected.items():
        gap = np.linalg.norm(found[name] - value.numpy()) / np.linalg.norm(value.numpy())
        assert gap < 3e-3, name


def test_a_task_is_cut_to_the_batch_that_was_compiled(folder: Path) -> None:
    assert artifact_subject(load(folder)).rows == 2


def test_other_sizes_are_refused(encoder: Program, folder: Path) -> None:
    with pytest.raises(DataError, match=r"length in \[9, 9\]"):
        load(folder).run(**arrays_of(encoder, {"batch": 2, "length": 10}))


@pytest.fixture(scope="module")
def several(encoder: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tvm") / "artifact"
    lower(encoder, "tvm-cpu", sizes={"batch": 2}, lengths=(5, 9), measure=False, captured=encoder).save(path)
    return path


@pytest.mark.parametrize("length", [1, 4, 5, 7, 9])
def test_a_length_in_between_is_padded(encoder: Program, several: Path, length: int) -> None:
    arrays = arrays_of(encoder, {"batch": 2, "length": length})
    # a sequence that ends before the other
    arrays["mask"][1, max(length - 2, 1) :] = 0
    expected = encoder.run({name: torch.from_numpy(value) for name, value in arrays.items()})
    found = load(several, threads=1).run(**arrays)
    assert found["hidden"].shape == (2, length, 24)
    keep = arrays["mask"].astype(bool)
    np.testing.assert_allclose(found["hidden"][keep], expected["hidden"].numpy()[keep], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["pooled"], expected["pooled"].numpy(), rtol=1e-4, atol=1e-5)


def test_functions_share_what_is_equal(several: Path, folder: Path) -> None:
    stored = read_signature(several / "model.so")
    assert [function.inputs["ids"] for function in stored.functions] == [[2, 5], [2, 9]]
    first, second = (set(function.parameters) for function in stored.functions)
    assert first & second
    # two functions do not hold the weights twice
    assert (several / "model.so.npz").stat().st_size < 1.5 * (folder / "model.so.npz").stat().st_size


@pytest.mark.parametrize("sizes", [{"batch": 2, "length": 10}, {"batch": 1, "length": 5}])
def test_what_no_function_takes(encoder: Program, several: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"in \[1, 9\]|in \[2, 2\]"):
        load(several).run(**arrays_of(encoder, sizes))
    with pytest.raises(DataError, match=r"compiled for \[2, 5\] and \[2, 9\]"):
        open_runner("tvm-cpu", several, threads=1).run(arrays_of(encoder, sizes))


UNMASKED = """
program "unmasked" lifted
dim length in [1, 64]
input %x: f32[1,length,8]
param %w: f32[8,8]
%y: f32[1,length,8] = xf.linear(%x, %w)
%z: f32[1,8] = aten.mean.dim(%y) {dim=[1]}
return y=%y, z=%z
"""
# the mean counts what is padded, whatever the mask says of the other output
DISOBEDIENT = UNMASKED.replace("param %w", "input %mask: i64[1,length]\nparam %w").replace(
    "return y=%y", "return y=%y valid keep %mask"
)
LONGER = """
program "longer" lifted
dim length in [1, 64]
input %x: f32[1,length,8]
input %mask: i64[1,length]
param %first: f32[1,1,8]
%y: f32[1,length+1,8] = aten.cat([%first, %x]) {dim=1}
return x=%x valid keep %mask, y=%y
"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (UNMASKED, "has no padding mask"),
        (DISOBEDIENT, "changes the model's answer"),
        (LONGER, "the output y is length\\s*\\+\\s*1 long"),
    ],
)
def test_what_is_not_padded(text: str, why: str) -> None:
    program = Program.parse(text)
    artifact = lower(program, "tvm-cpu", lengths=(9, 4), measure=False)
    for length in (4, 9):
        arrays = arrays_of(program, {"length": length})
        expected = program.run({name: torch.from_numpy(value) for name, value in arrays.items()})
        for name, value in artifact.run(**arrays).items():
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=why):
        artifact.run(**arrays_of(program, {"length": 6}))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7])
def test_a_batch_runs_in_parts(encoder: Program, batches: Artifact, batch: int) -> None:
    for length in (5, 8):
        arrays = arrays_of(encoder, {"batch": batch, "length": length})
        arrays["mask"][-1, length - 2 :] = 0
        expected = encoder.run({name: torch.from_numpy(value) for name, value in arrays.items()})
        found = batches.run(**arrays)
        keep = arrays["mask"].astype(bool)
        np.testing.assert_allclose(found["hidden"][keep], expected["hidden"].numpy()[keep], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["pooled"], expected["pooled"].numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def batches(encoder: Program) -> Artifact:
    return lower(encoder, "tvm-cpu", lengths=(5, 9), batches=(2, 3), measure=False, captured=encoder)


def test_parts_are_as_large_as_fits() -> None:
    assert Batching(("x",), (2, 4)).parts(11) == [(0, 4, 4), (4, 4, 4), (8, 2, 2), (10, 1, 2)]
    assert Batching(("x",), (3,)).parts(2) == [(0, 2, 3)]


MIXED = """
program "mixed" lifted
dim batch in [1, 64]
input %x: f32[batch,8]
%m: f32[1,8] = aten.mean.dim(%x) {dim=[0], keepdim=true}
%y: f32[batch,8] = aten.sub.Tensor(%x, %m)
return y=%y
"""
SUMMED = """
program "summed" lifted
dim batch in [1, 64]
input %x: f32[batch,8]
%y: f32[8] = aten.sum.dim_IntList(%x) {dim=[0]}
return y=%y
"""


@pytest.mark.parametrize(("text", "why"), [(MIXED, "items depend on each other"), (SUMMED, "the output y does not")])
def test_what_does_not_run_in_parts(text: str, why: str) -> None:
    program = Program.parse(text)
    artifact = lower(program, "tvm-cpu", batches=(2, 5), measure=False)
    for batch in (2, 5):
        arrays = arrays_of(program, {"batch": batch})
        expected = program.run({name: torch.from_numpy(value) for name, value in arrays.items()})["y"]
        np.testing.assert_allclose(artifact.run(**arrays)["y"], expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=why):
        artifact.run(**arrays_of(program, {"batch": 3}))


def test_lengths_are_for_tvm(encoder: Program) -> None:
    with pytest.raises(UsageError, match="takes any batch"):
        lower(encoder, "ort-cpu", batches=(4, 8))
    with pytest.raises(UsageError, match="has no dimension 'batch'"):
        lower(Program.parse(UNMASKED), "tvm-cpu", batches=(1, 4))
    with pytest.raises(UsageError, match="takes any length"):
        lower(encoder, "ort-cpu", lengths=(4, 8))
    with pytest.raises(DataError, match="The size 65"):
        lower(encoder, "tvm-cpu", lengths=(4, 65))
    with pytest.raises(UsageError, match="'many'"):
        the_sizes("4,many", "--lengths")
    assert the_sizes("8, 4", "--batches") == [8, 4]


def test_the_runner_tells_the_time_of_kernels(encoder: Program, folder: Path) -> None:
    runner = open_runner("tvm-cpu", folder, threads=1)
    arrays = arrays_of(encoder, SIZES)
    times = runner.profile(arrays, 2)
    assert times is not None
    assert any(time.name.startswith("matmul") for time in times)
    # and runs as before afterwards
    assert set(runner.run(arrays)) == {"hidden", "pooled"}
    assert runner.size_bytes > 0


def test_a_library_for_another_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    from xformopt.lowering.tvm_session import TvmSession

    for path in folder.glob("model.so*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.so").write_bytes(b"\x7fELF not this one")
    with pytest.raises(ArtifactError, match="another processor"):
        TvmSession(tmp_path / "model.so")


def test_an_operator_tvm_does_not_know_is_named() -> None:
    line = "%y: f32[4] = aten.special_bessel_j0(%x)  # layer.0.window"
    text = f'program "odd" lifted\ninput %x: f32[4]\n{line}\nreturn y=%y'
    with pytest.raises(LoweringError, match=r"special_bessel_j0 at layer.0.window. Lower the program for ort-cpu\.$"):
        lower(Program.parse(text), "tvm-cpu")


def test_a_traced_node_knows_its_origin(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_trace, "kernel_of", lambda operator: None)
    traced = tvm_trace.trace(encoder, reference_inputs(encoder, SIZES))
    origins = [tvm_trace.origin_of(node) for node in traced.graph.nodes if node.op == "call_function"]
    assert tvm_trace.Origin("xf.attention", "layer.0.attention") in origins
    assert all(origins)


def test_a_library_is_no_onnx_file(encoder: Program, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="writes no ONNX"):
        export(encoder, tmp_path / "model.onnx", target="tvm-cpu")


def test_the_last_panel_overlaps_the_one_before() -> None:
    weight = np.arange(15, dtype=np.float32).reshape(5, 3)
    panels = pack(weight, 4)
    assert panels.shape == (2, 3, 4)
    np.testing.assert_array_equal(panels[0], weight[:4].T)
    np.testing.assert_array_equal(panels[1], weight[1:].T)


def test_functions_of_other_sizes_have_other_names() -> None:
    plain = Sizes(1, 9, 9, 4, 4, 6, 6, 0.4, False, False, -1, -1)
    others = [
        Sizes(1, 9, 9, 4, 4, 6, 6, 0.25, False, False, -1, -1),
        Sizes(1, 9, 9, 4, 4, 6, 6, 0.4, True, False, -1, -1),
        Sizes(1, 9, 9, 4, 4, 6, 6, 0.4, False, False, 0, -1),
    ]
    assert len({plain.name, *(sizes.name for sizes in others)}) == 4


@pytest.mark.parametrize(
    ("isa", "architecture", "runs"),
    [
        (("avx2", "fma", "f16c", "avx512f"), "x86_64", {"tvm-cpu", "tvm-x86-64-v3"}),
        # an Atom, or a virtual machine that hides them
        (("avx2",), "x86_64", {"tvm-cpu"}),
        ((), "x86_64", {"tvm-cpu"}),
        (("asimd", "asimddp"), "aarch64", {"tvm-cpu", "tvm-aarch64"}),
        # a Raspberry Pi 4 has no dot products
        (("asimd",), "aarch64", {"tvm-cpu"}),
    ],
)
def test_what_runs_where(
    isa: tuple[str, ...], architecture: str, runs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(describe_machine(), isa=isa, architecture=architecture)
    monkeypatch.setattr(tvm_build, "describe_machine", lambda: machine)
    assert {target for target in tvm_build.TVM_TARGETS if tvm_build.runs_here(target)} == runs


def test_a_missing_cross_linker_names_its_package(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LoweringError, match=r"aarch64-linux-gnu-gcc.*package gcc-aarch64-linux-gnu on Debian"):
        lower(encoder, "tvm-aarch64", sizes=SIZES)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="needs the package gcc-aarch64-linux-gnu")
def test_a_library_for_arm64_is_linked_and_not_run(encoder: Program, tmp_path: Path) -> None:
    lower(encoder, "tvm-aarch64", sizes=SIZES).save(tmp_path / "artifact")
    header = (tmp_path / "artifact" / "model.so").read_bytes()[:20]
    # the machine field of an ELF header: 183 is AArch64
    assert int.from_bytes(header[18:20], "little") == 183
    with pytest.raises(ArtifactError, match="another processor"):
        load(tmp_path / "artifact").run(**arrays_of(encoder, SIZES))
