"""What is built is what is in the tree, under one top-level name, and it runs away from the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "kernels", "models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLEAN = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}


def files_of_the_tree() -> set[str]:
    """Return what the wheel must hold, by its path there."""
    found = {}
    for room in ("xformopt", *ROOMS):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = str(path.relative_to(ROOT))
                found[inside if room == "xformopt" else f"xformopt/{inside}"] = path
    return set(found)


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the tree, and the wheel built from that sdist."""
    tree, out = tmp_path_factory.mktemp("tree") / "copy", tmp_path_factory.mktemp("dist")
    # a copy: what an earlier build left in the tree must not leak into this one
    keep_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "tests"
    )
    shutil.copytree(ROOT, tree, ignore=keep_out)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, and borrows the libraries of this one."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    site = next(home.glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    python = home / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=home)
    return python


def test_wheel_holds_every_file_of_the_tree(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files_of_the_tree()


def test_wheel_claims_one_name(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"xformopt"}


def test_sdist_holds_the_licence_and_every_file(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    rooms = {name.removeprefix("xformopt/") if name.split("/")[1] in ROOMS else name for name in files_of_the_tree()}
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", *rooms} <= held


def test_installed_package_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, xformopt, xformopt.kernels, xformopt.passes, xformopt.models
from xformopt.kernels.definition import load_operators
assert "attention" in load_operators()
assert not any(importlib.util.find_spec(name) for name in ("passes", "models"))
print(xformopt.__file__)
"""
    where = run(installed, "-c", code, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent.parent)


def test_installed_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert "optimize" in run(installed.parent / "xformopt", "--help", cwd=tmp_path)


def test_every_source_folder_is_a_package() -> None:
    for room in ("xformopt", *ROOMS):
        for path in (ROOT / room).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py: the wheel would lack it"


def test_every_data_file_is_listed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["xformopt"]
    listed = {path for pattern in data for path in (ROOT / "xformopt").glob(pattern)}
    present = {p for p in (ROOT / "xformopt").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert present <= listed, f"package-data in pyproject.toml lacks {present - listed}"


def packages_of(extra: str) -> set[str]:
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0]
        if name == "xformopt":
            inner = re.search(r"\[([^]]*)\]", requirement)
            assert inner is not None
            found |= {p for part in inner[1].split(",") for p in packages_of(part.strip())}
        found.add(name)
    return found


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_no_extra_brings_both_runtimes(extra: str) -> None:
    assert not {"onnxruntime", "onnxruntime-gpu"} <= packages_of(extra), "they install the same import name"


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in PROJECT["dependencies"]}
    for extra in ("ort", "openvino", "hf", "demo", "dev"):
        wanted |= {name.lower() for name in packages_of(extra)}
    assert wanted <= pinned
    assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_the_root_is_not_on_the_path() -> None:
    root = str(ROOT.resolve())
    found = [entry for entry in sys.path if entry and str(Path(entry).resolve()) == root]
    if "" in sys.path:
        found.append("the current folder")
    assert not found, (
        "The repository root is on sys.path, where its `kernels` shadows the package of that name which transformers "
        "uses. Run `pytest` (the entry point) or set PYTHONSAFEPATH=1 instead of `python -m pytest`."
    )
