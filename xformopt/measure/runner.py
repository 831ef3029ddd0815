"""Owns what the measurement asks of anything it runs: a model opened on one target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "DistantRunner", "OpenRunner", "OperatorTime", "Runner"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class OperatorTime:
    """Kernel time of one node, summed over the profiled runs."""

    name: str
    op_type: str
    total_ms: float
    count: int  # executions over all profiled runs


class Runner(Protocol):
    """A model opened on one target, ready to run on arrays."""

    target: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    size_bytes: int  # of the model's files
    precision: str
    fallbacks: list[str]  # one line per node that runs elsewhere than asked

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once and return when the outputs are on the host."""
        ...

    def profile(self, inputs: Mapping[str, np.ndarray], rounds: int) -> list[OperatorTime] | None:
        """Return the kernel time of every node over `rounds` runs, or None where the target cannot tell."""
        ...


@runtime_checkable
class DistantRunner(Runner, Protocol):
    """A runner on another machine, which times itself: clock and memory of this one say nothing of it."""

    def time_round(self, inputs: Mapping[str, np.ndarray], min_seconds: float) -> list[float]:
        """Return the samples of one round in milliseconds."""
        ...


class OpenRunner(Protocol):
    """What opens a Runner; `xformopt.lowering:open_runner` is the real one."""

    def __call__(self, target: str, path: Path, *, threads: int, profile_to: Path | None = None) -> Runner:
        """Open the model at `path` on `target` with `threads` threads."""
        ...
