"""Lowering end to end: targets, tuning, large models, refusals."""

from __future__ import annotations

import errno
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from xformopt.errors import ArtifactError, DataError, LoweringError, MissingExtraError, OutputError, UsageError
from xformopt.lowering import build, load, lower, onnx_files, open_runner, targets, tuning
from xformopt.lowering.onnx_export import export_onnx
from xformopt.lowering.onnx_files import CandidateFolder
from xformopt.lowering.onnx_forms import build_graph, offered_forms
from xformopt.lowering.reference import largest_gap, reference_inputs, relative_l2
from xformopt.program import Program, save_program


def small(body: str, inputs: str = "input %x: f32[batch,8]") -> Program:
    return Program.parse(f'program "small" captured\ndim batch in [1, inf]\n{inputs}\n{body}')


def test_large_weights_lie_beside_the_graph(
    encoder: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setattr(onnx_files, "_SINGLE_FILE_BYTES", 1000)
    lower(encoder, measure=False).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.onnx").stat().st_size < 20_000
    loaded = load(tmp_path / "saved")
    assert loaded.size_bytes > (tmp_path / "saved" / "model.onnx.data").stat().st_size
    found = loaded.run(**{name: value.numpy() for name, value in batch.items()})
    assert relative_l2(encoder.run(batch)["pooled"], torch.from_numpy(found["pooled"])) < 1e-6


def test_linear_weights_are_stored_transposed_and_once(encoder: Program, tmp_path: Path) -> None:
    lower(encoder, measure=False).save(tmp_path / "saved")
    graph = onnx.load(tmp_path / "saved" / "model.onnx").graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes["up.w.transposed"] == [24, 48]
    assert "up.w" not in shapes
    assert not [node for node in graph.node if node.op_type == "Transpose"]


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    program = Program.parse("""
program "tied" lifted
dim batch in [1, inf]
input %ids: i64[batch,6] below 40
param %table: f32[40,8]
%x: f32[batch,6,8] = aten.embedding(%table, %ids)
%y: f32[batch,6,40] = xf.linear(%x, %table)
return logits=%y
""")
    lower(program, measure=False).save(tmp_path / "saved")
    graph = onnx.load(tmp_path / "saved" / "model.onnx").graph
    assert [t.name for t in graph.initializer if len(t.dims) == 2] == ["table"]


def test_plain_linear_layers_need_no_lifting(tmp_path: Path) -> None:
    program = small("param %w: f32[4,8]\n%y: f32[batch,4] = aten.linear(%x, %w)\nreturn y=%y")
    artifact = lower(program, measure=False)
    artifact.save(tmp_path / "saved")
    graph = onnx.load(tmp_path / "saved" / "model.onnx").graph
    assert [node.op_type for node in graph.node] == ["MatMul"]
    # a captured program is its own original
    assert load(tmp_path / "saved").original().fingerprint == program.fingerprint


def test_outputs_may_repeat_each_other_and_inputs() -> None:
    program = small("%y: f32[batch,8] = aten.relu(%x)\nreturn a=%y, b=%y, c=%x")
    found = lower(program, measure=False).run(x=-np.ones((2, 8), np.float32))
    assert {name: float(value.sum()) for name, value in found.items()} == {"a": 0.0, "b": 0.0, "c": -16.0}


def test_an_output_named_as_an_input_is_refused() -> None:
    program = small("%y: f32[batch,8] = aten.relu(%x)\nreturn x=%y")
    with pytest.raises(LoweringError, match="an input and an output named 'x'"):
        lower(program, measure=False)


def test_an_operator_without_translation_is_named() -> None:
    program = small("%y: f32[batch,8] = aten.special_bessel_j0(%x)  # head.strange\nreturn y=%y")
    with pytest.raises(LoweringError, match=r"prims\.bessel_j0, used in head\.strange, has no ONNX translation"):
        lower(program, measure=False)


def test_baselines_and_unknown_targets_are_refused(encoder: Program) -> None:
    with pytest.raises(UsageError, match="baseline"):
        lower(encoder, "eager")
    with pytest.raises(UsageError, match="no target 'abacus'"):
        lower(encoder, "abacus")
    with pytest.raises(UsageError, match="no target 'abacus'"):
        open_runner("abacus", "nowhere", threads=1)


def test_a_missing_runtime_names_its_extra(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"xformopt\[ort\]"):
        lower(encoder, measure=False)


def test_a_result_that_differs_is_refused(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from xformopt.kernels.activation import onnx as forms
    from xformopt.kernels.onnx_form import Form
    from xformopt.lowering import onnx_forms

    wrong = (Form("wrong", lambda b, node: b.op("Relu", node["x"])),)
    monkeypatch.setattr(forms, "FORMS", wrong)
    onnx_forms.forms_of.cache_clear()
    try:
        with pytest.raises(LoweringError, match="computes something else"):
            lower(encoder, measure=False)
    finally:
        onnx_forms.forms_of.cache_clear()


def test_extra_files_are_copied(encoder: Program, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    saved = lower(encoder, measure=False, files=[tokenizer]).save(tmp_path / "saved")
    assert "tokenizer.json" in saved.manifest.files
    with pytest.raises(OutputError, match="not a file"):
        lower(encoder, measure=False, files=[tmp_path / "none.json"])
    (tmp_path / "program.txt").write_text("mine")
    with pytest.raises(OutputError, match="artifact's own files"):
        lower(encoder, measure=False, files=[tmp_path / "program.txt"])


def test_sizes_must_fit(encoder: Program) -> None:
    with pytest.raises(DataError, match="no dimension 'width'"):
        lower(encoder, sizes={"width": 3})
    with pytest.raises(DataError, match="outside of length"):
        lower(encoder, sizes={"length": 65})


def test_examples_are_repeated_and_cut(encoder: Program) -> None:
    program = encoder.copy(
        example_inputs={"ids": torch.tensor([[7, 8, 9]]), "mask": torch.ones(1, 3, dtype=torch.long)}
    )
    assert reference_inputs(program)["ids"].tolist() == [[7, 8, 9]]
    assert reference_inputs(program, {"batch": 2, "length": 5})["ids"].tolist() == [[7, 8, 9, 7, 8]] * 2
    drawn = reference_inputs(encoder)
    assert drawn["ids"].shape == (1, 64)
    assert int(drawn["mask"].min()) == 1


def test_padding_does_not_count(encoder: Program, batch: dict[str, torch.Tensor]) -> None:
    expected = encoder.run(batch)
    found = {name: value.numpy().copy() for name, value in expected.items()}
    found["hidden"][1, 6] += 100
    assert largest_gap(encoder, batch, expected, found)[1] == 0
    found["hidden"][1, 4] = np.nan
    assert largest_gap(encoder, batch, expected, found) == ("hidden", float("inf"))


def test_tuning_tries_every_form_and_remembers(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch": 1, "length": 5}
    steps: list[str] = []
    first = lower(encoder, sizes=sizes, threads=1, progress=lambda what, done, total: steps.append(what)).manifest
    tried = {(record.operator, record.form) for record in first.tuning}
    expected = {(op, name) for op, names in offered_forms(export_onnx(encoder)).items() for name in names[1:]}
    assert tried == expected
    assert first.tuned_at == sizes
    assert "timing attention as multi_head_attention" in steps
    assert all(record.ratio is not None or record.note for record in first.tuning)

    def fail(*_: object) -> None:
        raise AssertionError("the answer was not remembered")

    monkeypatch.setattr(tuning._Search, "run", fail)
    again = lower(encoder, sizes=sizes, threads=1).manifest
    assert (again.forms, again.tuning) == (first.forms, first.tuning)


def test_tuning_keeps_what_is_faster(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(self: object, best: object, rival: object) -> tuple[float, bool]:
        return 0.5, True

    monkeypatch.setattr(tuning._Search, "_compare", compare)
    forms = lower(encoder, threads=1).manifest.forms
    assert forms["attention"] == {"matmul_softmax": 1}
    assert forms["linear"] == {"gemm": 4}


def test_tuning_does_not_time_what_is_wrong(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def gap(*_: object) -> tuple[str, float]:
        return "hidden", 0.5

    monkeypatch.setattr(tuning, "largest_gap", gap)
    manifest = lower(encoder, threads=1).manifest
    assert {record.note for record in manifest.tuning} <= {
        "not timed: hidden differs by 5.0e-01",
        "not timed: the same graph as before",
    }


def test_tuning_stops_in_time(encoder: Program) -> None:
    manifest = lower(encoder, threads=1, tuning_seconds=0).manifest
    assert {record.note for record in manifest.tuning} == {"not timed: out of time"}


def test_a_damaged_cache_is_found_again(encoder: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    lower(encoder, threads=1, tuning_seconds=0)
    (stored,) = (tmp_path / "tuning").iterdir()
    stored.write_text("{")
    lower(encoder, threads=1, tuning_seconds=0)
    assert json.loads(stored.read_text())["forms"] == {}


def test_candidates_share_their_weights(encoder: Program, tmp_path: Path) -> None:
    exported = export_onnx(encoder)
    folder = CandidateFolder(tmp_path)
    folder.write(build_graph(exported, {}).model)
    size = (tmp_path / "weights.data").stat().st_size
    folder.write(build_graph(exported, {"attention": "matmul_softmax"}).model)
    assert (tmp_path / "weights.data").stat().st_size == size > 0


def test_targets_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [target.name for target in targets()]
    for_gpus, by_tvm = ["ort-cuda", "openvino-cpu", "triton-cuda"], ["tvm-cpu", "tvm-x86-64-v3", "tvm-aarch64"]
    assert names == ["eager", "inductor", "ort-cpu", *for_gpus, *by_tvm]
    from xformopt.lowering import catalog

    real = catalog.importlib.util.find_spec
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else real(n, *a))
    (described,) = [target for target in targets() if target.name == "ort-cpu"]
    assert not described.available
    assert "xformopt[ort]" in described.why_not


@pytest.mark.parametrize("target", ["eager", "ort-cpu", "openvino-cpu"])
def test_runners_run_and_profile(target: str, encoder: Program, saved: Path, batch: dict[str, torch.Tensor]) -> None:
    if target == "openvino-cpu":
        pytest.importorskip("openvino")
    path = saved / "program" if target == "eager" else saved
    threads = torch.get_num_threads()
    runner = open_runner(target, path, threads=1)
    torch.set_num_threads(threads)
    arrays = {name: value.numpy() for name, value in batch.items()}
    found = runner.run(arrays)
    assert (runner.target, runner.input_names, runner.output_names) == (target, ("ids", "mask"), ("hidden", "pooled"))
    assert relative_l2(encoder.run(batch)["pooled"], torch.from_numpy(found["pooled"])) < 1e-5
    times = runner.profile(arrays, 3)
    assert times
    assert times[0].total_ms >= times[-1].total_ms
    assert runner.size_bytes > 10_000
    assert runner.precision == "fp32"
    assert runner.fallbacks == []


def test_the_profile_names_modules(saved: Path, batch: dict[str, torch.Tensor]) -> None:
    runner = open_runner("ort-cpu", saved / "model.onnx", threads=1)
    times = runner.profile({name: value.numpy() for name, value in batch.items()}, 2)
    assert times is not None
    assert {"layer.0.attention/Attention"} <= {time.name for time in times}
    assert {time.count for time in times} == {2}


@pytest.mark.slow
def test_inductor_runs(encoder: Program, tmp_path: Path, batch: dict[str, torch.Tensor]) -> None:
    save_program(encoder, tmp_path / "saved")
    threads = torch.get_num_threads()
    runner = open_runner("inductor", tmp_path / "saved", threads=1)
    found = runner.run({name: value.numpy() for name, value in batch.items()})
    torch.set_num_threads(threads)
    assert relative_l2(encoder.run(batch)["pooled"], torch.from_numpy(found["pooled"])) < 1e-5


def test_openvino_artifacts_hold_standard_operators_only(
    encoder: Program, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    pytest.importorskip("openvino")
    lower(encoder, "openvino-cpu").save(tmp_path / "saved")
    graph = onnx.load(tmp_path / "saved" / "model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    found = load(tmp_path / "saved").run(**{name: value.numpy() for name, value in batch.items()})
    assert relative_l2(encoder.run(batch)["pooled"], torch.from_numpy(found["pooled"])) < 1e-5


def test_a_runner_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_runner("ort-cpu", tmp_path / "none.onnx", threads=1)
    with pytest.raises(ArtifactError, match="not a saved Program"):
        open_runner("eager", tmp_path, threads=1)


def test_equal_runs_write_equal_files(encoder: Program, tmp_path: Path) -> None:
    first = lower(encoder, threads=1, captured=encoder).save(tmp_path / "first").manifest
    second = lower(encoder, threads=1, captured=encoder).save(tmp_path / "second").manifest
    assert first == second


def test_a_full_disk_is_told(encoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_onnx", write)
    with pytest.raises(OutputError, match=r"disk is full.*TMPDIR"):
        lower(encoder, measure=False)


def test_nothing_stays_in_the_folder_for_temporary_files(
    encoder: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    artifact = lower(encoder, threads=1, tuning_seconds=0)
    assert len(list(tmp_path.iterdir())) == 1
    del artifact
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError):
        lower(encoder, measure=False, files=[tmp_path / "none"])
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_query_without_keys_is_finite_and_by_definition_zero() -> None:
    program = Program.parse("""
program "empty" lifted
dim batch in [1, inf]
input %q: f32[batch,5,16]
input %mask: bool[batch,5]
%y: f32[batch,5,16] = xf.attention(%q, %q, %q, %mask) {heads=2, kv_heads=2, scale=0.5}
return y=%y
""")
    inputs = {"q": torch.randn(2, 5, 16), "mask": torch.tensor([[True] * 5, [False] * 5])}
    exported = export_onnx(program)
    for form in ("attention", "multi_head_attention", "matmul_softmax"):
        blob = ir.serde.serialize_model(build_graph(exported, {"attention": form}).model).SerializeToString()
        session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        assert np.isfinite(found).all()
        assert relative_l2(program.run(inputs)["y"][0], torch.from_numpy(found[0])) < 1e-6
        if form == "matmul_softmax":
            assert not found[1].any()
