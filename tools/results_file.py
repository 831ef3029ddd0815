"""What programs that measure share: a file of results that grows, and rows that compare with the exact artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.measure.machine import describe_machine
from xformopt.measure.statistics import paired_difference
from xformopt.models.tasks.task import Score
from xformopt.program import Program
from xformopt.report.schema import Run

__all__ = ["FOLDER", "ResultsFile", "beside", "timed"]

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class ResultsFile:
    """A JSON file with an entry for each model or task; entries come one by one, maybe from several processes.

    Attributes:
        path: Where it is.
        schema: What it says of its form: ``xformopt/NAME/1``.
        key: What holds the entries.
        about: What else it says of all entries.

    """

    path: Path
    schema: str
    key: str = "models"
    about: Mapping[str, str] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """Return what the file holds so far."""
        found: dict[str, Any] = json.loads(self.path.read_text())[self.key] if self.path.exists() else {}
        return found

    def put(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write an entry; what stood under its name is replaced, the others stay."""
        self.path.parent.mkdir(exist_ok=True)
        head = {"schema": self.schema, "machine": vars(describe_machine()), **self.about}
        text = {**head, self.key: {**self.entries(), name: entry}}
        self.path.write_text(json.dumps(text, indent=1, default=str) + "\n")


def beside(exact: Score | None, score: Score | None) -> dict[str, Any]:
    """Return what an artifact reaches on a task, beside what the exact one does on the same items."""
    if exact is None or score is None:
        return {}
    weights = None if score.weights is None else score.weights.tolist()
    found = paired_difference(exact.items.tolist(), score.items.tolist(), weights)
    interval = None if found is None else [found.low, found.high]
    difference = score.value - exact.value
    return {"value": score.value, "difference": difference, "difference_ci95": interval, "details": score.details}


def timed(
    candidates: Sequence[Candidate],
    exact: Program,
    inputs: Mapping[str, torch.Tensor],
    source: str,
    *,
    rounds: int = 15,
    profile_rounds: int = 0,
) -> dict[str, Run]:
    """Time artifacts in one run on two threads, rounds interleaved; speed-ups are over the one named ``exact``."""
    arrays = {key: value.numpy() for key, value in inputs.items()}
    reference = {key: value.numpy() for key, value in exact.run(dict(inputs)).items()}
    settings = BenchSettings(threads=2, rounds=rounds, round_seconds=0.2, over="exact", profile_rounds=profile_rounds)
    return {run.name: run for run in run_bench(candidates, arrays, reference, settings=settings, source=source).runs}
