"""Passes are found by the names of their files, and read with typed options."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import pytest

from xformopt.errors import PassError, UsageError
from xformopt.passes import build_pass, find_pass, format_pass, list_passes, parse_pass, pass_files
from xformopt.pipeline import Context, Pass, PassResult
from xformopt.program import Program


@dataclass(frozen=True)
class MergeThings(Pass):
    """Merge things.

    Attributes:
        r: Things merged in each layer,
            counted in pairs.
        metric: What is compared.
        layers: Which layers; none: all.
        share: Part of them.
        fast: Whether to hurry.

    """

    r: int = 8
    metric: Literal["keys", "values"] = "keys"
    layers: tuple[int, ...] | None = None
    share: float = 0.5
    fast: bool = False

    effect: ClassVar = "approximate"

    def __post_init__(self) -> None:
        if self.r < 0:
            raise ValueError("r must not be negative")

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program, False)


MERGE = "some_package:MergeThings"


@pytest.fixture(autouse=True)
def some_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("some_package")
    module.MergeThings = MergeThings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_package", module)


def test_names_are_unique() -> None:
    assert {name: files for name, files in pass_files().items() if len(files) != 1} == {}


def test_every_pass_is_found_by_its_name() -> None:
    for name in pass_files():
        kind = find_pass(name)
        assert kind().name == name
        assert find_pass(name.replace("-", "_")) is kind


def test_one_name_imports_one_pass() -> None:
    code = (
        "import sys; from xformopt.passes import find_pass; find_pass('fuse-add-norm'); "
        "print([m for m in sys.modules if m.startswith('xformopt.passes.f') and m.count('.') == 3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "['xformopt.passes.fuse.fuse_add_norm']"


def test_listing() -> None:
    listed = {info.name: info for info in list_passes()}
    assert set(pass_files()) <= set(listed)
    info = listed["fuse-qkv"]
    assert (info.family, info.effect) == ("fuse", "exact")
    (option,) = info.options
    assert (option.name, option.type, option.default) == ("siblings", "attention | all", "attention")
    assert option.doc.startswith("attention: the projections of one attention")
    assert all(option.doc for info in listed.values() for option in info.options), "an option says nothing of itself"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MERGE, MergeThings()),
        (f"{MERGE}{{r=3,metric=values}}", MergeThings(3, "values")),
        (f"{MERGE}{{ layers=[1,2, 5], share=1e-2, fast=true }}", MergeThings(layers=(1, 2, 5), share=0.01, fast=True)),
        (f"{MERGE}{{layers=none}}", MergeThings()),
    ],
)
def test_reads_options(text: str, expected: MergeThings) -> None:
    assert parse_pass(text) == expected


def test_accepts_dashes_in_options() -> None:
    assert build_pass("fold-constants", {"limit": "5"}) == parse_pass("fold_constants{limit=5}")


def test_writes_what_it_reads() -> None:
    pass_ = MergeThings(3, layers=(1, 2))
    assert format_pass(pass_) == "merge-things{r=3,layers=[1,2]}"
    assert format_pass(MergeThings()) == "merge-things"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fuse-qvk", "There is no pass named 'fuse-qvk'. Did you mean fuse-qkv"),
        ("zzz", "See `xformopt passes`"),
        ("nowhere.at_all:Pass", "the module nowhere cannot be found"),
        ("os.path:join", "os.path defines no pass class join"),
        ("some_package:Missing", "some_package defines no pass class Missing"),
        ("fuse-qkv{", "is not a pass: write NAME or NAME{option=value,...}"),
        ("fuse-qkv{siblings}", "'siblings' in .* is not an option: write option=value"),
        ("fuse-qkv{heads=2}", "has no option 'heads'. Its options: siblings .attention | all, default attention"),
        ("fuse-qkv{siblings=some}", "refuses siblings='some': input should be 'attention' or 'all'"),
        ("canonicalize{x=1}", "has no option 'x'. It has no options"),
        (f"{MERGE}{{r=few}}", "refuses r='few': input should be a valid integer"),
        (f"{MERGE}{{r=-1}}", "refuses its options: r must not be negative"),
    ],
)
def test_explains_wrong_usage(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_pass(text)


def test_tells_a_missing_pass_from_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_pass.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PassError, match="could not be imported: No module named 'a_module_that_is_not_there'"):
        find_pass("broken_pass:Broken")
