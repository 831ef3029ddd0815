"""Checkpoints: what is stored comes back, and what does not fit says which tensor."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xformopt.errors import DataError, UsageError
from xformopt.models import trained as trained_module
from xformopt.models.checkpoint import MOST_BYTES, load_checkpoint, save_checkpoint
from xformopt.models.tasks.index import tasks
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained
from xformopt.models.zoo import find_model, find_trained, is_model, trained


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 2)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(Net(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)


def test_weights_are_stored_in_half_precision_and_read_as_they_were(stored: Path) -> None:
    assert load_file(stored)["first.weight"].dtype == torch.float16
    assert load_file(stored)["steps"].dtype == torch.int64
    torch.manual_seed(0)
    wanted, found = Net(), load_checkpoint(Net(), stored)
    for name, value in found.state_dict().items():
        assert value.dtype == wanted.state_dict()[name].dtype
        assert torch.equal(value, wanted.state_dict()[name].half().to(value.dtype))


def test_another_width(stored: Path) -> None:
    with pytest.raises(
        DataError, match=r"does not fit .* Net: the tensor first\.weight is \[3, 4\] instead of \[5, 4\]"
    ):
        load_checkpoint(Net(5), stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first.bias": None}, r"lacks the tensor first\.bias, \[3\]"),
        ({"third.bias": torch.ones(2)}, r"a tensor third\.bias, \[2\], which the model does not"),
        ({"second.bias": torch.tensor([1.0, float("nan")])}, r"second\.bias has values that are not finite"),
    ],
)
def test_the_first_tensor_that_differs_is_named(
    changes: dict[str, torch.Tensor | None], message: str, stored: Path
) -> None:
    edit(stored, **changes)
    with pytest.raises(DataError, match=message):
        load_checkpoint(Net(), stored)


def test_a_file_that_is_missing_or_cut_short(stored: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.safetensors is missing"):
        load_checkpoint(Net(), stored.with_name("absent.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-5])
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(Net(), stored)


def test_what_may_not_be_stored(tmp_path: Path) -> None:
    net = Net()
    net.first.weight.data[0, 0] = 1e6
    with pytest.raises(DataError, match=r"first\.weight has values that fp16 cannot hold"):
        save_checkpoint(net, tmp_path / "large.safetensors")
    with pytest.raises(DataError, match="may have 4,000,000"):
        save_checkpoint(nn.Linear(2000, 1100), tmp_path / "large.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_module, "CHECKPOINTS", tmp_path)
    model = Trained("net", "nothing", Net, lambda module, fold, progress: None, (), "", folds=3)
    assert (model.label, model.on_fold(2).label) == ("net", "net{fold=2}")
    assert model.on_fold(2).path == tmp_path / "net-2.safetensors"
    with pytest.raises(UsageError, match="no fold 3: it has folds 0 to 2"):
        model.on_fold(3)
    before = torch.random.get_rng_state()
    save_checkpoint(model.fresh(), model.path)
    assert torch.equal(torch.random.get_rng_state(), before)
    built = model.build()
    assert not built.training
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_training_is_the_same_every_time() -> None:
    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        x = torch.rand(8, 4, generator=generator)
        return (module(x) - x[:, :2]).square().mean()

    ends, shown = [], []
    for _ in range(2):
        torch.manual_seed(0)
        net = Net(16)
        fit(net, loss, Schedule(steps=100, rate=0.03), lambda what, done, total: shown.append((done, total)))
        ends.append(net.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert shown[99] == (100, 100)
    assert not net.training
    x = torch.rand(32, 4, generator=torch.Generator().manual_seed(1))
    assert float((net(x) - x[:, :2]).square().mean()) < 0.02


def test_the_rate_rises_and_falls() -> None:
    factors = [Schedule(steps=100, rate=1.0, warmup=0.1).factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] < 0.01


def test_trained_models_bear_the_names_of_their_tasks() -> None:
    for name, model in trained().items():
        assert model.task in tasks()
        assert name.startswith(f"{model.task}-")
        assert is_model(name)
        assert model.sources
        assert model.folds in (1, tasks()[model.task].folds)


def test_every_trained_model_has_its_checkpoints() -> None:
    for model in trained().values():
        for fold in range(model.folds):
            path = model.on_fold(fold).path
            assert path.stat().st_size <= MOST_BYTES
            model.on_fold(fold).build()


def test_names_that_mean_nothing() -> None:
    with pytest.raises(UsageError, match="Did you mean digits-vit"):
        find_model("digit-vit")
    with pytest.raises(UsageError, match="no trained model 'vit-tiny'"):
        find_trained("vit-tiny")
    with pytest.raises(UsageError, match="vit-tiny has random weights and no folds"):
        find_model("vit-tiny{fold=0}")
    with pytest.raises(UsageError, match="no fold 5"):
        find_model("digits-vit{fold=5}")
