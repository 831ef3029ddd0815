"""Tiles are chosen by measurement, kept for this machine and version, and refused from another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xformopt.kernels.attention.tvm import Sizes
from xformopt.kernels.linear.tvm import matmul
from xformopt.kernels.log_attention.tvm import Levels, log_attention
from xformopt.kernels.tvm_form import Tile, Trial
from xformopt.kernels.weight_only_linear.tvm import matmul as code_matmul
from xformopt.lowering.tuning_cache import choices_file
from xformopt.lowering.tvm_tuning import CACHE_FILE, Tiling, choose_tiles

tvm = pytest.importorskip("tvm")

TILES = (Tile(2, 8), Tile(1, 16))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))


def build(function: Any) -> Callable[..., None]:
    compiled: Callable[..., None] = tvm.compile(
        tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target="llvm"
    )["main"]
    return compiled


def trial(make: Callable[[Tile], Any] | None = None) -> Trial:
    def make_product(tile: Tile) -> Any:
        return matmul((8, 16), (8, 16), tile, has_bias=False, function=None)

    return Trial(make or make_product, Tile(4, 8), TILES)


def choose(trials: dict[str, Trial], seconds: float = 60.0) -> Tiling:
    return choose_tiles(trials, build, threads=1, seconds=seconds, progress=lambda what, done, total: None)


def test_an_answer_is_found_once() -> None:
    first = choose({"matmul_8": trial()})
    (record,) = first.records
    assert record.note.endswith("of 2 tiles timed, of 2")
    assert first.tiles["matmul_8"] in (Tile(4, 8), *TILES)

    def fail(tile: Tile) -> Any:
        raise AssertionError("measured again")

    again = choose({"matmul_8": trial(fail)})
    assert again == Tiling(first.tiles)


def test_operands_are_the_same_for_every_tile() -> None:
    """Panels lie otherwise for each tile, so that numbers drawn for them would tell tiles apart."""
    sizes = Sizes(1, 9, 11, 2, 2, 4, 8, 0.5, False, False, -1, -1, bias=(1, 2, 9, 11))
    levels = Levels(4, 52, 37, round_table=True, flush=True)
    trials = {
        "log_attention": trial(lambda tile: log_attention(sizes, levels, tile)),
        "matmul_codes": trial(lambda tile: code_matmul((9, 16), (9, 16), tile, 2, 2, has_bias=True)),
    }
    for record in choose(trials).records:
        assert record.relative_l2 is not None
        assert record.relative_l2 < 1e-5


def test_without_time_the_default_stays_and_is_not_remembered() -> None:
    assert choose({"matmul_8": trial()}, seconds=-1.0).tiles == {}
    assert not (choices_file(CACHE_FILE)).exists()


def test_a_tile_that_computes_something_else_is_not_taken() -> None:
    def make(tile: Tile) -> Any:
        # what it should compute for the default alone
        function = None if tile == Tile(4, 8) else "relu"
        return matmul((8, 16), (8, 16), tile, has_bias=False, function=function)

    found = choose({"matmul_8": trial(make)})
    assert found.tiles["matmul_8"] == Tile(4, 8)
    assert found.records[0].relative_l2 is not None
    assert found.records[0].relative_l2 > 0.1


@pytest.mark.parametrize("changed", ["cpu", "tvm", "version"])
def test_answers_from_elsewhere_are_ignored_and_that_is_said(changed: str) -> None:
    choose({"matmul_8": trial()})
    path = choices_file(CACHE_FILE)
    stored = json.loads(path.read_text())
    stored["made_for"][changed] = "another"
    path.write_text(json.dumps(stored))
    note, measured = choose({"matmul_8": trial()}).records
    assert note.note == f"tvm-tiles.json is ignored: it was made for another {changed}"
    assert measured.form == "matmul_8"


def test_a_damaged_file_is_ignored_and_that_is_said() -> None:
    path = choices_file(CACHE_FILE)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    note, _ = choose({"matmul_8": trial()}).records
    assert note.note == "tvm-tiles.json is ignored: it cannot be read"
