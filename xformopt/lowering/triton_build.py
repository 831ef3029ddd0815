"""Program -> an AOTInductor package for the GPU at hand, with what loads it needs to know beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xformopt.errors import LoweringError
from xformopt.kernels.triton_form import Tile, Trial, use_tiles
from xformopt.lowering.program_export import explain, without_warnings
from xformopt.lowering.triton_export import export_kernels, require_triton
from xformopt.lowering.triton_session import SIGNATURE, missing_gpu
from xformopt.lowering.triton_tuning import Tried
from xformopt.program import Program

__all__ = ["MODEL", "TRITON_TARGETS", "Package", "check_gpu_toolchain", "missing_for_gpu", "write_package"]

MODEL = "model.pt2"
TRITON_TARGETS = ("triton-cuda",)
Choose = Callable[[Mapping[str, Trial]], tuple[dict[str, Tile], tuple[Tried, ...]]]


@dataclass(frozen=True)
class Package:
    """What a package was made of.

    Attributes:
        forms: By operator, how many nodes are a ``kernel`` and how many run as operators of torch (``aten``).
        refused: Why a kernel did not take an operator.
        tried: How tiles were chosen.

    """

    forms: dict[str, dict[str, int]]
    refused: tuple[str, ...]
    tried: tuple[Tried, ...] = ()


def missing_for_gpu() -> str:
    """Say what this machine lacks to compile for a GPU, or nothing."""
    if why_not := missing_gpu():
        return why_not
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler was found: install g++ (the package g++ on Debian)"
    return ""


def check_gpu_toolchain(target: str) -> None:
    """Find out whether ``target`` can be compiled for here.

    Raises:
        MissingExtraError: Triton is not installed.
        LoweringError: there is no GPU, too old a one, or no compiler.

    """
    require_triton(f"The target {target}")
    if why_not := missing_for_gpu():
        raise LoweringError(f"The target {target} compiles for the GPU of the machine it runs on, and {why_not}.")


def write_package(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    folder: Path,
    choose: Choose | None = None,
    *,
    device: str = "cuda",
) -> Package:
    """Compile ``program`` for all sizes of its dimensions.

    Args:
        program: What to compile.
        inputs: Named inputs; their sizes are a hint.
        folder: Where the package and its signature go.
        choose: Chooses tiles by measurement; None takes the defaults.
        device: ``cuda``; on ``cpu`` only what holds no kernels.

    Raises:
        LoweringError: the program cannot be traced, or Inductor fails to compile it.

    """
    ready = export_kernels(program, device=device, sizes=program.bind(inputs))
    tiles, tried = choose(ready.trials) if choose is not None else ({}, ())
    with use_tiles(tiles), without_warnings(), torch.no_grad():
        try:
            torch._inductor.aoti_compile_and_package(ready.exported, package_path=os.fspath(folder / MODEL))
        except Exception as error:
            raise LoweringError(
                f"AOTInductor of torch {torch.__version__} could not compile {program.name}: {explain(error)[-600:]} "
                f"Lower it for ort-cuda."
            ) from error
    signature = _signature(program, device)
    (folder / f"{MODEL}{SIGNATURE}").write_text(json.dumps(signature, indent=1), encoding="utf-8")
    return Package(ready.forms, ready.refused, tried)


def _signature(program: Program, device: str) -> dict[str, Any]:
    def bounds(size: int | str) -> list[int | None]:
        return [size, size] if isinstance(size, int) else [program.dims[size].low, program.dims[size].high]

    return {
        "device": device,
        "capability": list(torch.cuda.get_device_capability()) if device == "cuda" else [],
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "inputs": {spec.name: [bounds(size) for size in spec.shape] for spec in program.inputs},
        "outputs": list(program.output_names),
    }
