"""Every bad input of the command line: exit status, one paragraph, no traceback, nothing written."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from xformopt.pipeline import Context, Pass, PassResult
from xformopt.program import Program

Refused = Callable[..., str]
QUICK = ("--no-bench", "--no-measure")


@dataclass(frozen=True)
class Sabotage(Pass):
    """A pass that ends in the way its option says."""

    how: str = "interrupt"

    def run(self, program: Program, context: Context) -> PassResult:
        if self.how == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "memory":
            raise MemoryError
        raise RuntimeError("the reason\n\nand where")


@pytest.fixture(autouse=True)
def sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("saboteur")
    module.Sabotage = Sabotage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "saboteur", module)
    monkeypatch.setattr(Sabotage, "__module__", "saboteur")


def optimize(refused: Refused, model: object, *more: object, status: int = 1) -> str:
    return refused(status, "optimize", model, "-o", "out", *QUICK, *more)


@pytest.mark.parametrize("words", [("optimize", "-o", "out"), ("export", "-o", "out"), ("inspect",), ("bench",)])
def test_missing_directory(words: tuple[str, ...], refused: Refused) -> None:
    assert 'no "no/such/model"' in refused(1, *words, "no/such/model")


def test_empty_directory(refused: Refused, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    assert "is empty" in optimize(refused, "empty")


def test_no_weights(refused: Refused, bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    assert "no weights" in optimize(refused, "bert")


def test_truncated_weights(refused: Refused, bert: Path) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in optimize(refused, "bert")


def test_renamed_weights(refused: Refused, bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    tensors["renamed.weight"] = tensors.pop("embeddings.word_embeddings.weight")
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    assert "word_embeddings" in optimize(refused, "bert")


def test_renamed_file(refused: Refused, bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "weights.safetensors")
    assert "no weights" in optimize(refused, "bert")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("ran",))


def test_a_pickle_that_runs_code(refused: Refused, bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert "pytorch_model.bin" in optimize(refused, "bert")


def test_a_doctored_pt2(refused: Refused, workplace: Path) -> None:
    exported = torch.export.export(torch.nn.Linear(2, 2).eval(), (torch.ones(3, 2),))
    torch.export.save(exported, workplace / "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as whole, zipfile.ZipFile("doctored.pt2", "w") as doctored:
        for name in whole.namelist():
            data = whole.read(name)
            doctored.writestr(name, pickle.dumps(Payload()) if "sample_inputs" in name else data)
        doctored.writestr("whole/extra/evil.pkl", pickle.dumps(Payload()))
    assert "doctored.pt2" in optimize(refused, "doctored.pt2")


def test_control_flow_that_depends_on_data(refused: Refused) -> None:
    message = optimize(refused, "tiny:branches")
    assert "tiny.py" in message or "Branches" in message


@pytest.mark.parametrize("factory", ["nan", "infinite"])
def test_parameters_that_are_not_finite(factory: str, refused: Refused) -> None:
    message = optimize(refused, f"tiny:{factory}")
    assert "out.weight" in message
    assert "NaN or infinite" in message


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--pass", "fuse-everything"], "no pass named 'fuse-everything'"),
        (["--pass", "canonicalise"], "Did you mean canonicalize"),
        (["--pass", "canonicalize{depth=3}"], "no option 'depth'"),
        (["--pass", "canonicalize{"], "is not a pass"),
        (["--recipe", "exakt"], 'Did you mean "exact"'),
        (["--recipe", "absent.toml"], "cannot be read"),
        (["--precision", "int3"], "Available: bf16, exact"),
        (["--precision", "fp32", "--recipe", "exact"], "Give one of them"),
        (["--target", "ort-gpu"], 'Did you mean "ort-cpu"'),
        (["--target", "eager"], "baseline to compare with"),
        (["--print-ir-after", "fuse-nothing"], "Name one of: all, lift, canonicalize"),
        (["--batch", "0"], "--batch"),
        (["--seed", "x"], "--seed"),
        (["--max-drift", "-1"], "--max-drift"),
        (["--fast"], "--fast"),
        (["another"], "another"),
        (["-m", "minilm"], "given twice"),
    ],
)
def test_wrong_usage_of_optimize(options: list[str], fragment: str, refused: Refused) -> None:
    assert fragment in optimize(refused, "tiny:Tiny", *options, status=2)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["optimise"], "No such command"),
        (["--fast"], "--fast"),
        (["optimize"], "No model is given"),
        (["optimize", "minilm"], "-o PATH"),
        (["export", "minilm"], "-o PATH"),
        (["inspect"], "No model is given"),
        (["inspect", "minilmm"], 'Did you mean "minilm"'),
        (["inspect", ""], "empty name"),
        (["bench"], "nothing to measure"),
        (["bench", "tiny:Tiny", "tiny:Tiny"], "Two models"),
        (["bench", "minilm", "--targets", "eagre"], 'Did you mean "eager"'),
        (["bench", "minilm", "--rounds", "0"], "--rounds"),
        (["report"], "FILE.json"),
        (["passes", "canonicalise"], "Did you mean canonicalize"),
        (["targets", "extra"], "extra"),
    ],
)
def test_wrong_usage(words: list[str], fragment: str, refused: Refused) -> None:
    assert fragment in refused(2, *words)


def test_sizes_that_do_not_fit(refused: Refused, bert: Path) -> None:
    assert "at most 16" in refused(2, "inspect", "bert", "--batch", "2", "--length", "17")
    assert "--length" in refused(2, "inspect", "bert", "--length", "0")


def test_output_exists(refused: Refused, workplace: Path) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "artifact.json").write_text("{}")
    assert "exists already. Pass --overwrite" in optimize(refused, "tiny:Tiny")


def test_output_is_something_else(refused: Refused, workplace: Path) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "thesis.txt").write_text("years of work")
    assert "not written by xformopt" in optimize(refused, "tiny:Tiny", "--overwrite")


def test_output_is_a_file(refused: Refused, workplace: Path) -> None:
    (workplace / "out").write_text("mine")
    assert "exists already" in optimize(refused, "tiny:Tiny")
    assert "file, not a directory" in refused(1, "optimize", "tiny:Tiny", "-o", "out/deeper")


@pytest.mark.parametrize("option", ["-o", "--json", "--save-recipe"])
def test_output_is_not_writable(
    option: str, refused: Refused, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    message = refused(1, "optimize", "tiny:Tiny", "-o", "out", option, "locked/inside")
    assert "Permission denied" in message


def test_outputs_are_checked_before_the_model_is_loaded(refused: Refused, workplace: Path) -> None:
    (workplace / "taken").mkdir()
    for option in ("--json", "--save-recipe"):
        assert "it is a directory" in refused(1, "optimize", "no/such", "-o", "out", option, "taken")
    (workplace / "taken.html").write_text("")
    assert "exists already" in refused(1, "report", "absent.json", "-o", "taken.html")
    (workplace / "taken.onnx").write_text("")
    assert "exists already" in refused(1, "export", "no/such", "-o", "taken.onnx")


def _full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")


@pytest.mark.parametrize("where", ["xformopt.lowering.artifact.save_program", "xformopt.lowering.build.write_onnx"])
def test_full_disk(where: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, _full)
    assert "disk is full" in optimize(refused, "tiny:Tiny")


def test_full_disk_leaves_what_was_there(refused: Refused, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "artifact.json").write_text("{}")
    monkeypatch.setattr("xformopt.lowering.artifact.save_program", _full)
    assert "disk is full" in optimize(refused, "tiny:Tiny", "--overwrite")


@pytest.mark.parametrize(
    ("how", "fragment"),
    [
        ("interrupt", "interrupted"),
        ("terminate", "interrupted"),
        ("memory", "sabotage failed with MemoryError"),
        ("fail", "sabotage failed with RuntimeError: the reason and where"),
    ],
)
def test_a_run_that_ends_early(how: str, fragment: str, refused: Refused) -> None:
    message = optimize(refused, "tiny:Tiny", "--pass", f"saboteur:Sabotage{{how={how}}}")
    assert fragment in message


def test_interrupted_while_writing(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xformopt.lowering.artifact.save_program", interrupt)
    assert "interrupted" in optimize(refused, "tiny:Tiny", "--json", "result.json")


def test_a_fault_of_ours(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: object, **options: object) -> None:
        raise AttributeError("'NoneType' object has no attribute\n 'shape'")

    monkeypatch.setattr("xformopt.inspection.cost", fault)
    message = refused(1, "inspect", "tiny:Tiny")
    assert "an unexpected AttributeError: 'NoneType' object has no attribute 'shape'. This is a fault" in message
    assert "--debug" in message


def test_debug_shows_where(command: Callable[..., object], workplace: Path) -> None:
    ended = command("inspect", "no/such/model", "--debug")
    assert "Traceback" in ended.err  # type: ignore[attr-defined]
    assert ended.status == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arrays", "fragment"),
    [
        ({"input_ids": np.ones(3, np.int64)}, "input_ids must be i64[batch, length], but is i64[3]"),
        ({"input_ids": np.ones((2, 3), np.float32)}, "but is f32[2, 3]"),
        ({"input_ids": np.full((2, 3), 11)}, "outside of [0, 10]"),
        ({"tokens": np.ones((2, 3), np.int64)}, "no array 'input_ids'"),
    ],
)
def test_calibration_that_does_not_fit(
    arrays: dict[str, np.ndarray], fragment: str, refused: Refused, workplace: Path
) -> None:
    np.savez(workplace / "data.npz", **arrays)  # type: ignore[arg-type]
    assert fragment in optimize(refused, "tiny:Tiny", "--calibration", "data.npz")


def test_calibration_that_is_not_there(refused: Refused, workplace: Path) -> None:
    assert "does not exist" in optimize(refused, "tiny:Tiny", "--calibration", "absent.npz")
    (workplace / "lines.txt").write_text("some words\n")
    assert "without a tokenizer.json" in optimize(refused, "tiny:Tiny", "--calibration", "lines.txt")


@pytest.mark.parametrize("content", [None, "", "{}", '{"schema": "other/1"}', "[1"])
def test_reports_that_are_none(content: str | None, refused: Refused, workplace: Path) -> None:
    if content is not None:
        (workplace / "b.json").write_text(content)
    assert "b.json" in refused(1, "report", "b.json")


def test_damaged_artifacts(refused: Refused, workplace: Path) -> None:
    (workplace / "artifact").mkdir()
    (workplace / "artifact" / "artifact.json").write_text("{}")
    for words in (["inspect"], ["bench"], ["optimize", "-o", "out"]):
        assert "artifact" in refused(1, *words, "artifact")
    shutil.rmtree(workplace / "artifact")
    (workplace / "model.onnx").write_bytes(b"not onnx")
    assert "model.onnx" in refused(1, "bench", "model.onnx")
    assert "no file" in refused(1, "bench", "absent.onnx")
    assert "ONNX file" in refused(1, "inspect", "model.onnx")
