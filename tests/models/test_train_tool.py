"""tools/train.py: a model trained again is compared with its checkpoints, within the tolerance that the tool states."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from xformopt.models import trained as trained_module
from xformopt.models import zoo
from xformopt.models.checkpoint import save_checkpoint
from xformopt.models.tasks.digits import Digits
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

pytest.importorskip("sklearn")
TOOL = Path(__file__).parents[2] / "tools" / "train.py"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1024, 10)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(pixel_values.flatten(1))}


def lesson(module: nn.Module, fold: int, progress: Callable[[str, int, int], None]) -> None:
    images, labels = Digits(fold).training()

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        rows = torch.randint(len(images), (32,), generator=generator)
        return nn.functional.cross_entropy(module(images[rows])["logits"], labels[rows])

    fit(module, loss, Schedule(steps=30, rate=1e-2), progress)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    found = Trained("digits-linear", "digits", Linear, lesson, ("none",), "a linear layer", folds=5)
    monkeypatch.setattr(trained_module, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(zoo, "trained", lambda: {"digits-linear": found})
    # the tool sets the threads of the whole process
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return found


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_trained_again_agrees(model: Trained, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["digits-linear", "--fold", "1"]) == 0
    assert [path.name for path in model.path.parent.iterdir()] == ["digits-linear-1.safetensors"]
    written = model.on_fold(1).path.read_bytes()
    capsys.readouterr()
    assert tool.main(["digits-linear", "--fold", "1", "--check"]) == 0
    shown = capsys.readouterr().out
    assert "digits-linear{fold=1}, trained again: accuracy" in shown
    # 0.005 for five folds is this for one
    assert "reproduced: differs by +0.0000, may differ by 0.0112, on 1 folds" in shown
    assert model.on_fold(1).path.read_bytes() == written
    assert tool.main(["digits-linear", "--fold", "1", "--judge"]) == 0


def test_another_checkpoint_is_told_apart(model: Trained, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(model.fresh(), model.path)
    assert tool.main(["digits-linear", "--fold", "0", "--check"]) == 1
    assert "digits-linear: NOT reproduced: differs by +0." in capsys.readouterr().out


def test_a_check_of_all_folds_is_kept(model: Trained, tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tool.ResultsFile(model.path.parent / "retraining.json", "xformopt/retraining/1")
    monkeypatch.setattr(tool, "RESULTS", kept)
    assert tool.main(["digits-linear"]) == 0
    assert tool.main(["digits-linear", "--fold", "1", "--check"]) == 0
    assert not kept.path.exists()
    assert tool.main(["digits-linear", "--check"]) == 0
    found = kept.entries()["digits-linear"]
    assert found["again"] == found["stored"]
    assert sum(fold["items"] for fold in found["folds"]) == 1797


@pytest.mark.parametrize(("distance", "agrees"), [(0.004, True), (0.006, False), (-0.006, False)])
def test_the_tolerance_of_all_folds(distance: float, agrees: bool, model: Trained, tool: ModuleType) -> None:
    pairs = [((0.9, 100), (0.9 + distance, 100))] * 5
    assert tool.compare(model, pairs)["reproduced"] is agrees


def test_refusals(model: Trained, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["digits-linear", "--fold", "5"]) != 0
    assert "no fold 5" in capsys.readouterr().err
    assert tool.main(["digits-linear", "--fold", "0", "--check"]) != 0
    assert "is missing. Train it again" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["digits-linear", "--check", "--judge"])
