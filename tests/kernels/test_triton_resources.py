"""What the Triton kernels take of a GPU, against the file that records it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xformopt.kernels.triton_form import load_kernels

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, int]]:
    kernels: dict[str, dict[str, int]] = json.loads((TOOLS / "results" / "kernels.json").read_text())["kernels"]
    return kernels


def test_every_kernel_is_recorded_for_the_architectures_that_run_it(recorded: dict[str, dict[str, int]]) -> None:
    cases = load("kernel_cases")
    kernels = load_kernels()
    assert {case.operator for case in cases.CASES} == set(kernels)
    names = set()
    for case in cases.CASES:
        operands, options = cases.operands_of(case)
        assert kernels[case.operator].accepts(*operands, **options) is None
        for launch in kernels[case.operator].plan(*operands, **options).launches:
            name = f"{case.operator}: {case.name}: {launch.kernel.fn.__name__}"
            least = kernels[case.operator].capability
            names |= {f"{name}: sm_{major}{minor}" for major, minor in ((8, 0), (9, 0)) if (major, minor) >= least}
    assert set(recorded) == names


def test_what_is_recorded_fits(recorded: dict[str, dict[str, int]]) -> None:
    assert load("kernel_margins").worse(recorded, recorded) == []
    assert max(took["stack_bytes"] for took in recorded.values()) <= 128


def test_a_worse_tile_is_named() -> None:
    worse = load("kernel_margins").worse
    before = {"registers": 100, "stack_bytes": 0, "shared_bytes": 1000}
    name = "norm: bf16: sm_80"
    assert worse({name: before}, {name: {**before, "registers": 116, "stack_bytes": 64}}) == []
    assert worse({name: before}, {name: {**before, "registers": 117}}) == [f"{name}: registers 100 -> 117"]
    assert worse({name: before}, {name: {**before, "stack_bytes": 65}}) == [f"{name}: stack_bytes 0 -> 65"]
    assert worse({name: before}, {name: {**before, "shared_bytes": 1001}}) == [f"{name}: shared_bytes 1000 -> 1001"]
    assert worse({}, {name: before}) == [f"{name}: not recorded"]
    assert worse({name: before}, {}) == [f"{name}: gone"]
    too_much = {**before, "shared_bytes": 200_000}
    assert worse({name: too_much}, {name: too_much}) == [f"{name}: 200000 bytes of shared memory, of 166912"]


def compile_kernels(option: str) -> None:
    command = [sys.executable, str(TOOLS / "compile_kernels.py"), option]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_no_tile_got_worse() -> None:
    compile_kernels("--check")


@pytest.mark.slow
def test_kernels_take_numbers_of_64_bits() -> None:
    compile_kernels("--wide")
