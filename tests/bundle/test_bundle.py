"""A bundle measures its artifacts where neither xformopt nor torch is, and refuses what was changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xformopt.bundle.pack import write_bundle
from xformopt.bundle.runner.__main__ import main
from xformopt.bundle.runner.contents import read_contents
from xformopt.bundle.runner.sessions import open_runner
from xformopt.cli import main as command_line
from xformopt.errors import ArtifactError, OutputError, UsageError
from xformopt.lowering import lower
from xformopt.program import Program
from xformopt.report.schema import BenchReport

QUICK = ("--rounds", "2", "--threads", "1")
# what a device has: numpy, the runtime, and what the runtime itself wants
_WANTED = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that finds numpy and ONNX Runtime, and neither torch nor xformopt."""
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    for name in _WANTED:
        found = [Path(folder) / name for folder in sys.path if (Path(folder) / name).is_dir()]
        if found:
            (site / name).symlink_to(found[0])
    return home / "bin" / "python"


def run_on_device(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # nothing of this process's settings reaches the device
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        [python, "-m", "runner", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_runs_without_torch_and_without_xformopt(bare_python: Path, unpacked: Path) -> None:
    absent = subprocess.run(
        [bare_python, "-c", "import importlib.util as u; print([u.find_spec(n) for n in ('torch', 'xformopt')])"],
        cwd=unpacked,
        env={},
        capture_output=True,
        text=True,
    )
    assert absent.stdout.strip() == "[None, None]", absent.stderr

    done = run_on_device(bare_python, unpacked, *QUICK, "--json", "out.json")

    assert done.returncode == 0, done.stdout + done.stderr
    report = BenchReport.from_json(unpacked / "out.json")
    assert [run.name for run in report.runs] == ["whole", "bare"]
    for run in report.runs:
        assert run.error is None
        assert (run.batch, run.length, run.threads) == (2, 5, 1)
        assert run.fidelity is not None
        assert run.fidelity.relative_l2 is not None
        assert run.fidelity.relative_l2 < 1e-5
        assert run.latency_ms is not None
        assert run.operators
    assert report.runs[1].speedup is not None
    assert report.protocol["process_per_run"]


def test_what_it_expects_is_what_the_original_computes(unpacked: Path, artifacts: Path) -> None:
    weights = np.load(unpacked / "expected.npz")
    from xformopt.lowering import load

    inputs = dict(np.load(unpacked / "inputs.npz"))
    found = load(artifacts / "whole").run(**inputs)
    np.testing.assert_allclose(found["hidden"], weights["hidden"], rtol=1e-5, atol=1e-6)
    assert dict(np.load(unpacked / "valid.npz"))["hidden"].shape == (2, 5)


@pytest.mark.parametrize("name", ["artifacts/whole/model.onnx", "expected.npz", "runner/measure/timing.py"])
def test_a_changed_file_is_refused(unpacked: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (unpacked / name).open("ab") as file:
        file.write(b"\n")

    assert main([*QUICK, "--json", str(unpacked / "out.json")], unpacked) == 1

    said = capsys.readouterr().err
    assert name in said
    assert "SHA-256" in said
    assert not (unpacked / "out.json").exists()


def _missing(folder: Path) -> None:
    (folder / "inputs.npz").unlink()


def _foreign(folder: Path) -> None:
    (folder / "bundle.json").write_text('{"format": "xformopt/bundle/99"}')


def _cut(folder: Path) -> None:
    (folder / "bundle.json").write_text("{")


def _outside(folder: Path) -> None:
    index = json.loads((folder / "bundle.json").read_text())
    index["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    (folder / "bundle.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_missing, "is missing"),
        (_foreign, "reads 'xformopt/bundle/1'"),
        (_cut, "is not a bundle"),
        (_outside, "not a file of the bundle"),
    ],
)
def test_a_damaged_bundle(unpacked: Path, damage: Any, reason: str) -> None:
    damage(unpacked)
    with pytest.raises(ArtifactError, match=reason):
        read_contents(unpacked)


def test_a_run_that_fails_costs_only_itself(bare_python: Path, unpacked: Path) -> None:
    index = json.loads((unpacked / "bundle.json").read_text())
    index["artifacts"][1]["target"] = "openvino-cpu"
    (unpacked / "bundle.json").write_text(json.dumps(index))

    done = run_on_device(bare_python, unpacked, *QUICK, "--json", "out.json")

    assert done.returncode == 1
    runs = BenchReport.from_json(unpacked / "out.json").runs
    assert runs[0].latency_ms is not None
    assert runs[1].error is not None
    assert "pip install openvino" in runs[1].error
    assert runs[1].latency_ms is None


def test_only_names_what_the_bundle_holds(unpacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing"], unpacked) == 2
    assert "it holds whole, bare" in capsys.readouterr().err


def test_the_same_bundle_has_the_same_bytes(packed: Path, artifacts: Path, tmp_path: Path) -> None:
    again = write_bundle([artifacts / "whole", artifacts / "bare"], tmp_path / "again.zip", batch=2, length=5)
    assert again.path.read_bytes() == packed.read_bytes()
    assert again.names == ("whole", "bare")


def test_without_an_original_the_reference_is_its_own(artifacts: Path, tmp_path: Path) -> None:
    made = write_bundle([artifacts / "bare"], tmp_path / "bundle.zip")
    assert "no artifact holds its original" in made.notes[0]
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path / "out")
        assert not [name for name in archive.namelist() if "program" in name]
    assert read_contents(tmp_path / "out").reference == "bare"


@pytest.mark.parametrize(
    ("names", "sizes", "error", "reason"),
    [
        ((), {}, UsageError, "nothing to bundle"),
        (("whole", "other"), {}, UsageError, "of two models"),
        (("bare",), {"batch": 3}, UsageError, "no-program"),
        (("whole",), {"length": 65}, UsageError, "length"),
        (("absent",), {}, ArtifactError, "not an artifact"),
    ],
)
def test_what_cannot_be_bundled(
    artifacts: Path, tmp_path: Path, names: tuple[str, ...], sizes: dict[str, int], error: type, reason: str
) -> None:
    with pytest.raises(error, match=reason):
        write_bundle([artifacts / name for name in names], tmp_path / "bundle.zip", **sizes)  # type: ignore[arg-type]
    assert not (tmp_path / "bundle.zip").exists()


def test_artifacts_of_fixed_size_decide(artifacts: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    shutil.copytree(artifacts / "whole", fixed)
    manifest = json.loads((fixed / "artifact.json").read_text())
    manifest["dims"] = [{"name": name, "low": size, "high": size} for name, size in (("batch", 1), ("length", 7))]
    (fixed / "artifact.json").write_text(json.dumps(manifest))
    made = write_bundle([artifacts / "whole", fixed], tmp_path / "bundle.zip")
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path / "out")
    assert read_contents(tmp_path / "out").inputs["ids"].shape == (1, 7)
    with pytest.raises(UsageError, match="length would have to be 7 and 8 at once"):
        write_bundle([fixed], tmp_path / "other.zip", length=8)


def test_the_command_says_how_to_run_it(artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bundle.zip"
    assert command_line(["bundle", str(artifacts / "bare"), "-o", str(path)]) == 0
    said = capsys.readouterr()
    assert "python -m runner" in said.out
    assert "no artifact holds its original" in said.err
    assert path.is_file()


def test_inputs_that_may_be_left_out_are_packed(small: Program, tmp_path: Path) -> None:
    text = str(small).replace("input %mask", "input %types: i64[batch,length] below 2 default zeros\ninput %mask")
    program = Program.parse(text)
    lower(program, measure=False, captured=program).save(tmp_path / "artifact")
    write_bundle([tmp_path / "artifact"], tmp_path / "bundle.zip", batch=2, length=5)
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        archive.extractall(tmp_path / "out")
    contents = read_contents(tmp_path / "out")
    assert contents.inputs["types"].shape == (2, 5)
    runner = open_runner("ort-cpu", contents.candidates[0].path, threads=1)
    np.testing.assert_allclose(runner.run(contents.inputs)["hidden"], contents.expected["hidden"], rtol=1e-5)


def test_a_bundle_that_exists_is_kept(artifacts: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_bundle([artifacts / "whole"], path)
    assert path.read_text() == "mine"
