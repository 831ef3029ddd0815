from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xformopt.capture.resolve import (
    Archive,
    ArtifactDirectory,
    Factory,
    HuggingFace,
    ModelForm,
    ZooModel,
    classify,
    resolve,
)
from xformopt.capture.source import Source
from xformopt.errors import CaptureError, UsageError, XformoptError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "artifact.json").write_text("{}")
    for name in ("model.pt2", "weights.bin", "net.py", "net.onnx", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("minilm", ZooModel("minilm")),
        ("vit-tiny", ZooModel("vit-tiny")),
        ("digits-vit", ZooModel("digits-vit")),
        ("digits-vit{fold=2}", ZooModel("digits-vit{fold=2}")),
        ("bert", HuggingFace(Path("bert"))),
        ("./bert/", HuggingFace(Path("bert"))),
        (Path("bert"), HuggingFace(Path("bert"))),
        ("made", ArtifactDirectory(Path("made"))),
        ("model.pt2", Archive(Path("model.pt2"))),
        ("net:make", Factory("net:make")),
        ("package.net:Box.make", Factory("package.net:Box.make")),
    ],
)
def test_forms(model: str | Path, form: ModelForm, home: Path) -> None:
    assert classify(model) == form


def test_a_path_wins_over_a_zoo_name(home: Path) -> None:
    (home / "minilm").mkdir()
    assert classify("minilm") == HuggingFace(Path("minilm"))


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("minilmm", UsageError, 'Did you mean "minilm"'),
        ("MiniLM", UsageError, 'Did you mean "minilm"'),
        ("berta", UsageError, 'Did you mean "bert"'),
        ("vit-tny", UsageError, '"vit-tiny"'),
        ("digits_vit", UsageError, 'Did you mean "digits-vit"'),
        ("digit-vit{fold=1}", UsageError, 'Did you mean "digits-vit"'),
        ("zzz", UsageError, "Expected a zoo name"),
        ("zoo", UsageError, "`xformopt models` lists them"),
        ("", UsageError, "empty name"),
        ("./brt", CaptureError, 'Did you mean "bert"?'),
        ("modl.pt2", CaptureError, 'Did you mean "model.pt2"?'),
        ("/no/such/place", CaptureError, "There is no"),
        (Path("zzz"), CaptureError, "There is no"),
        ("weights.bin", CaptureError, "weights without the model"),
        ("net.py", CaptureError, '"net:function"'),
        ("net.onnx", CaptureError, "ONNX"),
        ("notes.txt", CaptureError, "no model"),
    ],
)
def test_names_that_mean_nothing(model: str | Path, kind: type[XformoptError], message: str, home: Path) -> None:
    with pytest.raises(kind) as caught:
        classify(model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolve_builds_a_model_of_the_zoo() -> None:
    source = resolve("vit-tiny")
    assert isinstance(source, Source)
    assert list(source.example_inputs) == ["pixel_values"]
    assert source.description.startswith("vit-tiny: ")
    assert not any(parameter.requires_grad for parameter in source.module.parameters())
    again = resolve("vit-tiny")
    assert isinstance(again, Source)
    weights = zip(source.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_resolve_loads_each_form(
    home: Path, save_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(home))
    source = resolve(save_model("vit"), batch=2)
    assert isinstance(source, Source)
    assert source.example_inputs["pixel_values"].shape == (2, 3, 16, 16)
    Path("resolved_net.py").write_text("import torch\ndef make(): return torch.nn.Linear(2, 2), torch.ones(1, 2)\n")
    assert isinstance(resolve("resolved_net:make"), Source)
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), "linear.pt2")
    assert isinstance(resolve("linear.pt2"), torch.export.ExportedProgram)
    assert resolve("made") == ArtifactDirectory(Path("made"))


def test_classifying_imports_no_toolchain() -> None:
    code = "import sys, xformopt.capture.resolve; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
