"""The file of GPU results: entries that come one by one, over several calls on one machine."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NO_GPU", "GpuFile", "Job", "run_jobs"]

SCHEMA = "xformopt/gpu/1"
NO_GPU = "There is no NVIDIA GPU on this machine: nothing was measured, and nothing is estimated."


@dataclass(frozen=True)
class Job:
    """One measurement: its name, what does it and returns JSON values, and the minutes it may take."""

    name: str
    measure: Callable[[], Mapping[str, Any]]
    minutes: float = 0.5


@dataclass(frozen=True)
class GpuFile:
    """``{"schema", "machine", "note", "entries": {section: {name: {...}}}}``; ``machine`` is None without a GPU."""

    path: Path

    def read(self) -> dict[str, Any]:
        """Return what the file holds, or what an empty one does."""
        empty: dict[str, Any] = {"schema": SCHEMA, "machine": None, "note": "", "entries": {}}
        return json.loads(self.path.read_text()) if self.path.exists() else empty

    def say_there_is_no_gpu(self) -> bool:
        """Write an empty file that says so, unless it holds results; returns whether it was written."""
        if self.read()["entries"]:
            return False
        self._write({**self.read(), "machine": None, "note": NO_GPU, "entries": {}})
        return True

    def start(self, machine: Mapping[str, Any]) -> None:
        """State the machine.

        Raises:
            ValueError: the file holds results of another one.

        """
        content = self.read()
        before = content["machine"]
        if content["entries"] and before["gpu"]["name"] != machine["gpu"]["name"]:
            raise ValueError(
                f"{self.path} holds results of {before['gpu']['name']}, and this machine has "
                f"{machine['gpu']['name']}. Name another file with --output."
            )
        self._write({**content, "machine": dict(machine), "note": ""})

    def put(self, section: str, name: str, entry: Mapping[str, Any]) -> None:
        """Write one entry; the others stay."""
        content = self.read()
        content["entries"].setdefault(section, {})[name] = dict(entry)
        self._write(content)

    def has(self, section: str, name: str) -> bool:
        """Whether the entry is there and no error."""
        found = self.read()["entries"].get(section, {}).get(name)
        return found is not None and "error" not in found

    def _write(self, content: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        staged = self.path.with_suffix(".part")
        staged.write_text(json.dumps(content, indent=1) + "\n")
        staged.replace(self.path)


def run_jobs(
    file: GpuFile,
    section: str,
    jobs: Iterable[Job],
    *,
    deadline: float,
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Do what is not done yet and ends before ``deadline``; returns whether all of it is done.

    A job that fails leaves ``{"error": ...}`` and is tried anew by the next call; ``again`` repeats all of them.
    """
    for job in jobs:
        if not again and file.has(section, job.name):
            continue
        if clock() + job.minutes * 60 > deadline:
            return False
        started = clock()
        try:
            entry = {**job.measure(), "seconds": round(clock() - started, 1)}
        # one kernel that fails says nothing of the others
        except Exception as error:
            traceback.print_exc()
            entry = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
        file.put(section, job.name, entry)
        print(section, job.name, json.dumps(entry)[:300], flush=True)
    return True
