"""Programs with Triton kernels: what is exported, what packages refuse, and how tiles are chosen; all without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import randn, relative

from xformopt.errors import ArtifactError, DataError, LoweringError, UsageError
from xformopt.kernels.triton_form import Tile, Trial, load_kernels, tile_of, use_tiles
from xformopt.lowering import lower, targets
from xformopt.lowering.reference import reference_inputs
from xformopt.lowering.triton_build import MODEL, write_package
from xformopt.lowering.triton_export import export_kernels
from xformopt.lowering.triton_session import SIGNATURE, TritonSession
from xformopt.lowering.triton_tuning import CACHE_FILE, choose_tiles
from xformopt.passes.fuse.packing import Packing
from xformopt.passes.quantize.convert_precision import ConvertPrecision
from xformopt.pipeline import Context
from xformopt.program import Program

PLAIN = """
program "plain" lifted
dim rows in [1, 64]
input %x: f32[rows,24]
param %up.w: f32[48,24]
param %up.b: f32[48]
%u: f32[rows,48] = xf.linear(%x, %up.w, %up.b)  # up
%y: f32[rows,48] = aten.relu(%u)  # act
return y=%y
"""


def no_gpu() -> bool:
    return not torch.cuda.is_available()


def called(exported: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}


def run(program: Program, sizes: dict[str, int]) -> dict[str, float]:
    """Run the exported program under the interpreter; returns how far each output is from the eager one."""
    exported = export_kernels(program, device="cpu").exported
    inputs = reference_inputs(program, sizes, seed=3)
    for name, value in inputs.items():
        if "mask" in name:
            value[-1, value.shape[1] // 2 :] = 0
    with torch.no_grad():
        found = exported.module()(*(inputs[name] for name in program.input_names))
    expected = program.run(inputs)
    return {name: relative(ours, expected[name]) for name, ours in zip(program.output_names, found, strict=True)}


def test_an_exported_program_has_kernels_where_they_take_the_operands(encoder: Program) -> None:
    ready = export_kernels(encoder, device="cpu")
    assert ready.forms == {
        "attention": {"kernel": 1},
        "layer_norm": {"kernel": 1},
        "linear": {"aten": 3},
        "linear_activation": {"kernel": 1},
        "mean_pool": {"aten": 1},
    }
    kernels = {f"xf_triton.{name}.default" for name in ("attention", "layer_norm", "linear_activation")}
    assert kernels <= called(ready.exported)
    assert not any(name.startswith("xf.") for name in called(ready.exported))
    assert set(ready.trials) == {
        "attention in torch.float32, heads of 6 and 6",
        "linear_activation in torch.float32, 24 to 48",
    }
    paths = {node.meta.get("custom", {}).get("path") for node in ready.exported.graph.nodes}
    assert "layer.0.attention" in paths


@pytest.mark.parametrize("sizes", [{"batch": 2, "length": 9}, {"batch": 3, "length": 21}])
def test_it_computes_the_program_at_any_size(encoder: Program, sizes: dict[str, int]) -> None:
    assert max(run(encoder, sizes).values()) < 1e-5


def test_packed_attention_takes_its_kernel(encoder: Program) -> None:
    packed = Packing().run(encoder, Context()).program
    ready = export_kernels(packed, device="cpu")
    assert ready.forms["attention_packed"] == {"kernel": 1}
    assert "xf_triton.attention_packed.default" in called(ready.exported)
    # positions of padding hold zeros in the packed form, and are compared with that form
    assert max(run(packed, {"batch": 3, "length": 11}).values()) < 1e-5


def test_it_may_compute_in_halves_and_answers_in_float32(encoder: Program) -> None:
    exported = export_kernels(ConvertPrecision(to="bf16").run(encoder, Context()).program, device="cpu").exported
    inputs = reference_inputs(encoder, {"batch": 2, "length": 9}, seed=3)
    with torch.no_grad():
        found = exported.module()(*(inputs[name] for name in encoder.input_names))
    expected = encoder.run(inputs)
    kinds = {str(value.dtype) for value in exported.state_dict.values()}
    assert kinds == {"torch.bfloat16"}
    for name, ours in zip(encoder.output_names, found, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-4 < relative(ours, expected[name]) < 3e-2


def test_constants_go_to_the_device() -> None:
    text = 'program "c" lifted\ninput %x: f32[4]\n%r: f32[4] = aten.arange() {end=4, dtype=f32, device=cpu}\n'
    program = Program.parse(text + "%y: f32[4] = aten.add.Tensor(%x, %r)\nreturn y=%y")
    assert "meta" in str(export_kernels(program, device="meta").exported.graph)


def test_what_no_kernel_takes_runs_in_torch_and_is_listed() -> None:
    text = 'program "wide" lifted\ndim rows in [1, 8]\ninput %x: f32[rows,17000]\n'
    program = Program.parse(text + "%y: f32[rows,17000] = xf.layer_norm(%x) {eps=1e-05}  # top\nreturn y=%y")
    ready = export_kernels(program, device="cpu")
    assert ready.forms == {"layer_norm": {"aten": 1}}
    assert ready.refused == ("xf.layer_norm at top is computed by torch: its rows are 17000 wide, more than 16384",)


def test_heads_that_are_too_wide_are_refused() -> None:
    text = 'program "wide" lifted\ndim length in [1, 64]\ninput %x: f32[1,length,300]\n'
    attention = "%y: f32[1,length,300] = xf.attention(%x, %x, %x) {heads=1, kv_heads=1, scale=0.1}  # layer.0\n"
    with pytest.raises(LoweringError, match=r"xf\.attention at layer\.0.*300 wide, more than 256.*another target"):
        export_kernels(Program.parse(text + attention + "return y=%y"), device="cpu")


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_lowered(encoder: Program, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"triton-cuda compiles for the GPU.*finds no NVIDIA GPU here\.$"):
        lower(encoder, "triton-cuda")
    listed = {target.name: target for target in targets()}["triton-cuda"]
    assert not listed.available
    assert "NVIDIA GPU" in listed.why_not
    from xformopt.api import export

    with pytest.raises(LoweringError):
        export(encoder, tmp_path / "artifact", target="triton-cuda")
    assert not list(tmp_path.iterdir())


def test_a_package_is_no_onnx_file(encoder: Program, tmp_path: Path) -> None:
    from xformopt.api import export

    with pytest.raises(UsageError, match="writes no ONNX"):
        export(encoder, tmp_path / "model.onnx", target="triton-cuda")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def test_an_old_gpu_is_refused(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(LoweringError, match=r"Some GPU has the compute capability 7\.5.*need 8\.0"):
        lower(encoder, "triton-cuda")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What lies beside a package for an H100, and a file that is none."""
    path = tmp_path / MODEL
    path.write_bytes(b"cut short")
    signature = {"device": "cuda", "capability": [9, 0], "inputs": {"x": [[1, 64], [24, 24]]}, "outputs": ["y"]}
    (tmp_path / f"{MODEL}{SIGNATURE}").write_text(json.dumps(signature))
    return path


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
def test_a_package_needs_a_gpu(package: Path) -> None:
    with pytest.raises(ArtifactError, match=r"compute capability 9\.0, and torch .* finds no NVIDIA GPU"):
        TritonSession(package)


def test_a_package_for_another_architecture_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (8, 0))
    with pytest.raises(ArtifactError, match=r"compute capability 9\.0, and Some GPU has 8\.0.*Lower the model again"):
        TritonSession(package)


def test_a_damaged_package_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    with pytest.raises(ArtifactError, match="no package of AOTInductor"):
        TritonSession(package)
    package.with_name(f"{MODEL}{SIGNATURE}").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TritonSession(package)


ALONE = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
print(package(torch.ones(7, 24))[0].sum().item())
assert not [name for name in sys.modules if name.startswith("xformopt")]
"""


@pytest.mark.slow
def test_a_package_runs_with_torch_alone(tmp_path: Path) -> None:
    """On the processor, of a program that needs no kernel: the same writer and the same session."""
    program = Program.parse(PLAIN)
    written = write_package(program, reference_inputs(program), tmp_path, device="cpu")
    assert written.forms == {"linear": {"aten": 1}}
    session = TritonSession(tmp_path / MODEL)
    for rows in (1, 7, 64):
        x = randn(rows, 24)
        expected = program.run({"x": x})["y"]
        np.testing.assert_allclose(session.run({"x": x.numpy()})["y"], expected.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"Axis 0 of x is 65, and model\.pt2 was compiled for 1 to 64"):
        session.run({"x": np.zeros((65, 24), np.float32)})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", ALONE, str(tmp_path / MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = program.run({"x": torch.ones(7, 24)})["y"].sum()
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-5)


def tiny(trial: Trial, tiles: tuple[Tile, ...]) -> Trial:
    def operands(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q, k, v = (randn(1, 21, 12) for _ in range(3))
        return (q, k, v), {"heads": 2, "kv_heads": 2, "scale": 0.4}

    return dataclasses.replace(trial, tiles=tiles, operands=operands)


class Clock:
    """Says that every tile is faster than the one before it; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.calls += 1
        return 1.0 / self.calls


def test_tiles_are_chosen_once_by_operator_and_width() -> None:
    load_kernels()
    q, longer = randn(1, 21, 12), randn(3, 90, 12)
    trial_of = load_kernels()["attention"].trial
    assert trial_of is not None
    options = {"heads": 2, "kv_heads": 2, "scale": 0.4}
    trial = trial_of(q, q, q, **options)
    # the length is no part of the question
    assert (
        trial.key == trial_of(longer, longer, longer, **options).key == "attention in torch.float32, heads of 6 and 6"
    )
    trials = {trial.key: tiny(trial, (Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)))}
    clock = Clock()
    chosen, tried = choose_tiles(trials, device="cpu", clock=clock, progress=lambda *_: None)
    assert chosen == {trial.key: Tile(16, 32, 4, 2)}
    assert clock.calls == 3
    assert [(one.operator, one.ratio) for one in tried] == [("attention", 0.3333)]
    # found again in the cache, and used by plans made inside
    again, tried = choose_tiles(trials, device="cpu", clock=clock, progress=lambda *_: None)
    assert (again, tried, clock.calls) == (chosen, (), 3)
    plan = load_kernels()["attention"].plan
    with use_tiles(chosen):
        assert plan(longer, longer, longer, **options).launches[0].constants["N"] == 32
    assert plan(longer, longer, longer, **options).launches[0].constants["M"] == 64
    assert tile_of("something else", Tile(1, 2, 3, 4)) == Tile(1, 2, 3, 4)


def test_a_cache_from_elsewhere_is_ignored_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    path = tmp_path / "tuning" / CACHE_FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"made_for": {"name": "another GPU"}, "tiles": {"attention": [1, 1, 1, 1, 0]}}))
    chosen, tried = choose_tiles({}, device="cpu", progress=lambda *_: None)
    assert chosen == {}
    assert "made for another" in tried[0].note
    path.write_text("{")
    assert "cannot be read" in choose_tiles({}, device="cpu", progress=lambda *_: None)[1][0].note


def test_tiles_that_all_fail_are_an_error() -> None:
    trial_of = load_kernels()["attention"].trial
    assert trial_of is not None
    q = randn(1, 21, 12)
    trial = trial_of(q, q, q, heads=2, kv_heads=2, scale=0.4)
    # no power of two
    broken = {trial.key: tiny(trial, (Tile(24, 16, 4, 2),))}
    with pytest.raises(LoweringError, match=r"No tile of attention in torch\.float32.*\(24, 16, 4, 2, 0\)"):
        choose_tiles(broken, device="cpu", clock=Clock(), progress=lambda *_: None)
