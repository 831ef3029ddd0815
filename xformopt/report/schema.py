"""Owns the JSON of `bench` and of the pass history: what programs read and reports are drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xformopt.errors import DataError

__all__ = [
    "SCHEMA",
    "BenchReport",
    "FidelityRecord",
    "Latency",
    "MachineRecord",
    "NodeTime",
    "OperatorShare",
    "PassRecord",
    "RejectedCount",
    "Roofline",
    "Run",
    "Speedup",
]

SCHEMA: Final = "xformopt/bench/1"


class _Record(BaseModel):
    # later versions may write more than this one reads
    model_config = ConfigDict(extra="allow", populate_by_name=True)


class Latency(_Record):
    """Percentiles of one run in milliseconds; `ci95` is that of the median, None for a single sample."""

    p50: float
    p90: float
    p99: float
    ci95: tuple[float, float] | None = None


class FidelityRecord(_Record):
    """Nearness to the original in eager fp32 on valid positions; of several outputs, the worst."""

    relative_l2: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None


class Speedup(_Record):
    """How many times faster than the run named `over`."""

    over: str
    ratio: float
    ci95: tuple[float, float] | None = None

    @property
    def is_difference(self) -> bool:
        """Whether the interval is known and does not include 1."""
        return self.ci95 is not None and not self.ci95[0] <= 1.0 <= self.ci95[1]


class OperatorShare(_Record):
    """Kernel time of one operator type in one run of the model; `share` is of all kernel time, 0 to 1."""

    name: str
    ms: float
    share: float
    count: int | None = None


class NodeTime(_Record):
    """Kernel time of one node in one run of the model."""

    name: str
    operator: str
    ms: float


class Roofline(_Record):
    """Where a run stands under the measured peaks; `intensity` is in operations per byte."""

    gflops: float
    gbytes_s: float
    peak_gflops: float
    peak_gbytes_s: float
    intensity: float
    bound: Literal["compute", "memory"]


class Run(_Record):
    """One candidate as measured; one that failed has `error` and no times.

    One whose machine went away keeps the rounds it has and is `partial`; a note says why.
    """

    name: str
    target: str
    batch: int | None = None
    length: int | None = None
    latency_ms: Latency | None = None
    load_ms: float | None = None
    first_run_ms: float | None = None
    peak_memory_bytes: int | None = None
    base_memory_bytes: int | None = None
    size_bytes: int | None = None
    fidelity: FidelityRecord | None = None
    speedup: Speedup | None = None
    threads: int | None = None
    precision: str | None = None
    samples_ms: list[float] | None = None
    # the median of each round: rounds of a comparison are interleaved, so runs pair by round
    round_p50_ms: list[float] | None = None
    operators: list[OperatorShare] | None = None
    nodes: list[NodeTime] | None = None
    roofline: Roofline | None = None
    fallbacks: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    partial: bool = False
    error: str | None = None

    @property
    def model_memory_bytes(self) -> int | None:
        """Peak memory beyond what the process and its toolchain held before the model was loaded."""
        if self.peak_memory_bytes is None or self.base_memory_bytes is None:
            return None
        return max(self.peak_memory_bytes - self.base_memory_bytes, 0)


class RejectedCount(_Record):
    """How often a pass declined for one reason."""

    reason: str
    count: int


class PassRecord(_Record):
    """One pass of the history."""

    name: str
    effect: str
    changed: bool
    fired: int
    rejected: list[RejectedCount] = Field(default_factory=list)
    relative_l2: float | None = None
    seconds: float | None = None
    notes: list[str] = Field(default_factory=list)


class MachineRecord(_Record):
    """The machine, as `measure.machine` describes it."""

    cpu: str = "unknown"
    architecture: str | None = None
    cores: int | None = None
    physical_cores: int | None = None
    isa: list[str] = Field(default_factory=list)
    memory_bytes: int | None = None
    clock_mhz: float | None = None
    governor: str | None = None
    load_average: float | None = None
    os: str | None = None
    python: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    thread_variables: dict[str, str] = Field(default_factory=dict)
    peaks: dict[str, float] | None = None


class BenchReport(_Record):
    """A comparison of runs on one machine, and the history of the passes that made them."""

    schema_: Literal["xformopt/bench/1"] = Field(default=SCHEMA, alias="schema")
    machine: MachineRecord = Field(default_factory=MachineRecord)
    runs: list[Run] = Field(default_factory=list)
    source: str | None = None
    protocol: dict[str, Any] = Field(default_factory=dict)
    passes: list[PassRecord] = Field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what is not known, and what JSON cannot say (NaN), is null."""
        values: dict[str, Any] = json.loads(self.model_dump_json(by_alias=True))
        return values

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON.

        Raises:
            OutputError: `path` cannot be written.

        """
        from xformopt.files import write_atomically

        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that opens offline.

        Raises:
            OutputError: `path` cannot be written.

        """
        from xformopt.files import write_atomically
        from xformopt.report.html import render

        write_atomically(path, render([self]))

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what `bench --json` or `optimize --json` wrote.

        Raises:
            DataError: The file is missing, is not JSON, or is not such a report.

        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read the report {path}: {error}. Give a file that `xformopt bench --json` wrote."
            ) from error
        try:
            return cls.from_dict(values)
        except (ValidationError, TypeError, ValueError) as error:
            raise DataError(
                f'{path} is not a benchmark report of the schema "{SCHEMA}": {_first_fault(error)}. '
                "Give a file that `xformopt bench --json` or `xformopt optimize --json` wrote."
            ) from error

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read the values of a bench report, or of an optimize report, which holds one under "bench"."""
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
        inner = values.get("bench")
        if isinstance(inner, dict):
            values = {**inner, "passes": inner.get("passes") or values.get("passes", [])}
        if values.get("schema") != SCHEMA:
            raise ValueError(f'its "schema" is {json.dumps(values.get("schema"))}')
        return cls.model_validate(values)


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
    return str(error)
