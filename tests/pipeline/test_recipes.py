"""Recipes: what is saved is what is loaded, and every bad file says what is wrong with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from xformopt.errors import UsageError
from xformopt.inspection import passes_of
from xformopt.pipeline import Context, Pass, PassResult, Pipeline
from xformopt.pipeline.recipes import list_recipes, load_recipe, save_recipe
from xformopt.program import Program


@dataclass(frozen=True)
class Sketch(Pass):
    """A pass with an option of every kind."""

    rank: int = 4
    ratio: float = 0.5
    label: str = "plain"
    deep: bool = False
    layers: tuple[int, ...] = ()
    limit: int | None = None

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program, False)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "sketches", sys.modules[__name__])
    monkeypatch.setattr(Sketch, "__module__", "sketches")
    return "sketches:Sketch"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_that_ships_can_be_loaded(name: str) -> None:
    passes = load_recipe(name)
    assert passes
    assert len({step.name for step in passes}) == len(passes)


def test_exact_holds_exact_passes_only() -> None:
    assert {step.effect for step in load_recipe("exact")} == {"exact"}


def test_the_pipeline_takes_recipes_by_name() -> None:
    assert Pipeline.recipe("exact").passes == load_recipe("exact")


def test_options_are_read(tmp_path: Path, importable: str) -> None:
    text = f'description = "a sketch"\n[[pass]]\nname = "{importable}"\nrank = 8\nlayers = [1, 2]\ndeep = true\n'
    assert load_recipe(write(tmp_path, text)) == (Sketch(rank=8, layers=(1, 2), deep=True),)


@pytest.mark.parametrize(
    "step",
    [
        Sketch(),
        Sketch(rank=9, ratio=0.25, label='a "quoted" \\ line\nbreak', deep=True, layers=(3, 1), limit=7),
    ],
    ids=["defaults", "every option"],
)
def test_what_is_saved_is_what_is_loaded(step: Sketch, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "saved.toml"
    save_recipe([step, *load_recipe("exact")], path, description="two")
    assert load_recipe(path) == (step, *load_recipe("exact"))


def test_defaults_are_not_written(tmp_path: Path) -> None:
    save_recipe([Sketch(rank=9)], tmp_path / "saved.toml")
    assert "ratio" not in (tmp_path / "saved.toml").read_text()


def refuse(name: str | Path, *fragments: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_unknown_recipe_names_the_nearest_and_all() -> None:
    refuse("exakt", 'no recipe "exakt"', 'mean "exact"', "Available: bf16, exact")


def test_a_precision_without_a_recipe() -> None:
    refuse("int3", 'no recipe "int3"', "Available: ")


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.toml", "absent.toml", "No such file")


def test_a_directory(tmp_path: Path) -> None:
    refuse(tmp_path, "directory")


def test_what_looks_at_layers_one_by_one_goes_ahead_of_those_that_fuse() -> None:
    recipe = [step.name for step in load_recipe("exact")]
    at = recipe.index("fuse-bias-activation")
    structural, rest = ["prune-units", "recover-accuracy"], ["quantize-dynamic", "prune-sublayers", "fold-scale"]
    found = [step.name for step in passes_of("exact", structural + rest)]
    assert found == [*recipe[:at], *structural, *recipe[at:], *rest]
    assert [step.name for step in passes_of("exact", rest)] == [*recipe, *rest]
    assert [step.name for step in passes_of(None, rest)] == rest


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe\x00")
    refuse(path, "not UTF-8")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[[pass", "not valid TOML"),
        ('description = "empty"', "names no passes"),
        ("pass = 3", "names no passes"),
        ("[[pass]]\nrank = 3", "Pass 1"),
        ('[[passes]]\nname = "canonicalize"', 'unknown key "passes"'),
        ('description = 3\n[[pass]]\nname = "canonicalize"', "description"),
        ('[[pass]]\nname = "canonicalise"', "Did you mean canonicalize"),
        ('[[pass]]\nname = "canonicalize"\nrank = 3', "no option 'rank'"),
        ('[[pass]]\nname = "sketches:Sketch"\nrank = "many"', "refuses rank='many'"),
        ('[[pass]]\nname = "sketches:Nothing"', "defines no pass class"),
        ('[[pass]]\nname = "nowhere:Nothing"', "cannot be found"),
    ],
)
def test_a_bad_file(text: str, fragment: str, tmp_path: Path) -> None:
    refuse(write(tmp_path, text), fragment)
