"""Tiny models, a working directory of their own, and commands run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf

from xformopt.cli import main

TINY = """
import torch


class Tiny(torch.nn.Module):
    def __init__(self, weight=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 8)
        self.query, self.key, self.value, self.out = (torch.nn.Linear(8, 8) for _ in range(4))
        self.norm = torch.nn.LayerNorm(8)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
        if weight is not None:
            self.out.weight.data[1, 2] = weight

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        q, k, v = (self.split(f(x)) for f in (self.query, self.key, self.value))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.norm(x + self.out(y)) + self.mask[0]

    def example_inputs(self):
        return {"input_ids": torch.arange(10).reshape(2, 5)}


class Branches(Tiny):
    def forward(self, input_ids):
        x = super().forward(input_ids)
        return x * 2 if x.sum() > 0 else x


def nan():
    return Tiny(float("nan"))


def infinite():
    return Tiny(float("inf"))


def branches():
    return Branches()
"""
TEXT = {
    "vocab_size": 13,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the module ``tiny`` and a cache folder of its own."""
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    return tmp_path


@pytest.fixture
def command(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run one command in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Ended(status, said.out, said.err)

    return run


@pytest.fixture
def refused(command: Callable[..., Ended], workplace: Path) -> Callable[..., str]:
    """Run a command that must fail: one paragraph, no traceback, nothing written; returns the paragraph."""

    def run(status: int, *arguments: object) -> str:
        before = listing(workplace)
        ended = command(*arguments)
        assert ended.status == status, ended.err
        assert ended.out == ""
        assert "Traceback" not in ended.err
        assert ended.err.startswith("xformopt: error: ")
        assert ended.err.count("\n") == 1
        assert ended.err.endswith("\n")
        assert listing(workplace) == before
        return ended.err.removeprefix("xformopt: error: ").strip()

    return run


@pytest.fixture
def bert(workplace: Path) -> Path:
    """A Hugging Face directory."""
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**TEXT)).eval().save_pretrained(workplace / "bert")
    return workplace / "bert"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def listing(folder: Path) -> dict[str, int]:
    """Every path under a folder with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}
