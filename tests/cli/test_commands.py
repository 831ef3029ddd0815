"""Every command does its job on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import xformopt as xo
from xformopt.cli import main
from xformopt.pipeline.recipes import load_recipe

Command = Callable[..., "object"]
QUICK = ("--no-bench", "--no-measure")


def done(ended: object) -> str:
    assert ended.status == 0, ended.err  # type: ignore[attr-defined]
    assert "Traceback" not in ended.err  # type: ignore[attr-defined]
    return str(ended.out)  # type: ignore[attr-defined]


def test_optimize_writes_an_artifact(command: Command, workplace: Path) -> None:
    words = ("optimize", "tiny:Tiny", "-o", "out", *QUICK, "--json", "result.json", "--explain")
    out = done(command(*words, "--save-recipe", "mine.toml"))
    assert "canonicalize" in out
    assert "wrote out" in out
    assert "in int8" not in out
    result = json.loads((workplace / "result.json").read_text())
    first = result["passes"][0]
    assert {"name", "effect", "changed", "fired", "rejected", "relative_l2", "seconds"} <= set(first)
    assert first["name"] == "lift"
    assert result["bench"] is None
    assert load_recipe(workplace / "mine.toml") == load_recipe("exact")
    artifact = xo.load(workplace / "out")
    assert artifact.input_names == ("input_ids",)
    ids = np.ones((3, 4), np.int64)
    (output,) = artifact.run(input_ids=ids).values()
    assert output.shape == (3, 4, 8)
    assert sorted(path.name for path in workplace.iterdir()) == ["mine.toml", "out", "result.json", "tiny.py"]


def test_precision_int8_executes_in_int8(command: Command, workplace: Path) -> None:
    out = done(command("optimize", "tiny:Tiny", "-o", "out", *QUICK, "--precision", "int8", "--json", "result.json"))
    assert "linear layers executed in int8" in out
    (last,) = json.loads((workplace / "result.json").read_text())["passes"][-1:]
    assert (last["name"], last["effect"], last["changed"]) == ("quantize-dynamic", "approximate", True)
    assert json.loads((workplace / "out" / "artifact.json").read_text())["precision"] == "int8"


def test_options_with_underscores_and_by_other_names(command: Command, workplace: Path) -> None:
    words = ("optimize", "--model_name_or_path", "tiny:Tiny", "--output_path=out_dir", "--no_bench", "--no_measure")
    done(command(*words, "--print_ir_after", "lift"))
    assert (workplace / "out_dir" / "artifact.json").is_file()


def test_print_ir_after(command: Command) -> None:
    out = done(command("optimize", "tiny:Tiny", "-o", "out", *QUICK, "--print-ir-after", "all"))
    assert "# after lift\n" in out
    assert "# after canonicalize\n" in out
    assert "xf.attention" in out


def test_overwrite_replaces_an_artifact(command: Command, workplace: Path) -> None:
    done(command("export", "tiny:Tiny", "-o", "out", "--no-measure"))
    (workplace / "out" / "stale.txt").write_text("")
    done(command("optimize", "tiny:Tiny", "-o", "out", *QUICK, "--overwrite"))
    assert not (workplace / "out" / "stale.txt").exists()


def test_dry_run_writes_nothing(command: Command, workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    out = done(command("optimize", "tiny:Tiny", "--dry-run", "--pass", "canonicalize"))
    assert "then lower to ort-cpu" in out
    assert "xf.attention" in out
    assert sorted(workplace.rglob("*")) == before


def test_precision_fp32_is_the_exact_recipe(command: Command) -> None:
    words = ("optimize", "tiny:Tiny", "--dry-run", "--json", "-")
    plain = json.loads(done(command(*words)))
    assert json.loads(done(command(*words, "--precision", "fp32"))) == plain


def test_export_to_one_file(command: Command, workplace: Path) -> None:
    done(command("export", "tiny:Tiny", "-o", "deep/tiny.onnx", "--no-measure"))
    assert [path.name for path in (workplace / "deep").iterdir()] == ["tiny.onnx"]
    import onnxruntime

    session = onnxruntime.InferenceSession(workplace / "deep" / "tiny.onnx")
    assert session.get_inputs()[0].name == "input_ids"


def test_inspect_counts(command: Command) -> None:
    sizes = ("--batch", "3", "--length", "4")
    counted = json.loads(done(command("inspect", "tiny:Tiny", "--cost", "--json", "-", *sizes)))
    assert counted["operators"]["xf.attention"] == 1
    assert counted["sizes"] == {"batch": 3, "length": 4}
    assert counted["parameters"] * 4 == counted["parameter_bytes"]
    assert counted["flops"] > 4 * 2 * 12 * 64
    assert counted["nodes"] == sum(counted["operators"].values())


def test_inspect_prints_the_program(command: Command) -> None:
    out = done(command("inspect", "-m", "tiny:Tiny", "--ir"))
    assert out.startswith('program "Tiny" lifted')


def test_calibration_is_taken(command: Command, workplace: Path) -> None:
    np.savez(workplace / "data.npz", input_ids=np.arange(12).reshape(3, 4) % 11)
    done(command("optimize", "tiny:Tiny", "-o", "out", *QUICK, "--calibration", "data.npz"))


def test_a_hugging_face_directory_and_its_artifact(command: Command, bert: Path, workplace: Path) -> None:
    done(command("export", "bert", "-o", "out", "--no-measure"))
    first = json.loads(done(command("inspect", "bert", "--json", "-")))
    assert json.loads(done(command("inspect", "out", "--json", "-"))) == first


def test_optimize_compares_with_the_original(command: Command, workplace: Path) -> None:
    words = ("--rounds", "2", "--threads", "1", "--json", "o.json")
    assert "eager" in done(command("optimize", "tiny:Tiny", "-o", "out", "--no-measure", *words))
    optimized = json.loads(Path("o.json").read_text())
    assert [run["name"] for run in optimized["bench"]["runs"]] == ["eager", "ort-cpu"]
    assert optimized["bench"]["runs"][1]["fidelity"]["relative_l2"] < 1e-5
    assert {"bench.json", "report.html", "program"} <= {path.name for path in Path("out").iterdir()}
    done(command("report", "o.json", "out", "-o", "all.html"))
    assert "</html>" in Path("all.html").read_text()


@pytest.mark.slow
def test_bench(command: Command, workplace: Path) -> None:
    words = ("--rounds", "2", "--threads", "1", "--batch", "1", "--length", "7")
    done(command("export", "tiny:Tiny", "-o", "out", "--no-measure"))
    assert "eager" in done(command("bench", "out", "out/model.onnx", *words, "--json", "b.json"))
    runs = {run["name"]: run for run in json.loads(Path("b.json").read_text())["runs"]}
    assert set(runs) == {"eager", "out", "model"}
    assert (runs["out"]["batch"], runs["out"]["length"]) == (1, 7)
    assert runs["model"]["speedup"]["over"] == "eager"


def test_passes(command: Command) -> None:
    listed = json.loads(done(command("passes", "--json")))
    assert "canonicalize" in {each["name"] for each in listed}
    assert {"name", "family", "effect", "sources", "options"} <= set(listed[0])
    assert [each["name"] for each in json.loads(done(command("passes", "canonicalize", "--json")))] == ["canonicalize"]
    assert "canonicalize" in done(command("passes"))


def test_targets(command: Command) -> None:
    listed = json.loads(done(command("targets", "--json")))
    assert {"eager", "inductor", "ort-cpu", "openvino-cpu"} <= {each["name"] for each in listed}
    assert all(set(each) == {"name", "available", "why_not"} for each in listed)
    assert "ort-cpu" in done(command("targets"))


def test_doctor(command: Command) -> None:
    found = json.loads(done(command("doctor", "--json")))
    assert {"machine", "targets", "threads", "cache", "hints"} <= set(found)
    assert "torch" in found["machine"]["packages"]
    assert found["cache"]["bytes"] == 0
    assert "cache" in done(command("doctor"))


@pytest.mark.parametrize("words", [[], ["--help"], ["optimize", "--help"], ["--version"]])
def test_help_is_light(words: list[str]) -> None:
    heavy = ["torch", "numpy", "onnx", "onnxruntime", "transformers", "matplotlib", "rich"]
    code = (
        f"import sys; from xformopt.cli import main; status = main({words!r}); "
        f"print([name for name in {heavy!r} if name in sys.modules]); sys.exit(status)"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_arguments_come_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["xformopt", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"xformopt {xo.__version__}\n"
