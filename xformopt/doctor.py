"""What this installation can do: packages, targets, machine, threads, cache, and hints where something is amiss."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformopt.files import cache_folder
from xformopt.measure.machine import Machine, describe_machine

__all__ = ["Diagnosis", "diagnose"]

_BUSY = 0.5


@dataclass(frozen=True)
class Diagnosis:
    """The state of an installation.

    Attributes:
        machine: The machine, with the versions of Python and the packages.
        targets: Name, availability and why not, as ``targets --json`` lists them.
        threads: How many threads torch runs an operator with.
        cache: Folder, bytes and whether it can be written.
        hints: What would help, each a sentence.

    """

    machine: Machine
    targets: tuple[dict[str, Any], ...]
    threads: int
    cache: dict[str, Any]
    hints: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "machine": self.machine.to_dict()}

    def rows(self) -> list[tuple[str, str]]:
        """Return labels and values for reading."""
        from xformopt.report.wording import bytes_

        machine = self.machine
        writable = "" if self.cache["writable"] else ", not writable"
        return [
            ("xformopt", machine.packages.get("xformopt", "not installed as a package")),
            ("python", machine.python),
            *((name, version) for name, version in machine.packages.items() if name != "xformopt"),
            ("processor", machine.cpu),
            ("cores", f"{machine.cores} usable, {machine.physical_cores or 'unknown'} physical"),
            ("instructions", " ".join(machine.isa)),
            ("memory", bytes_(machine.memory_bytes)),
            ("threads", str(self.threads)),
            ("system", f"{machine.os} {machine.architecture}"),
            ("cache", f"{self.cache['folder']} ({bytes_(self.cache['bytes'])}{writable})"),
        ]


def diagnose() -> Diagnosis:
    """Look at the machine and the packages; nothing is changed."""
    import torch

    from xformopt.lowering import targets

    machine = describe_machine()
    found = tuple(
        {"name": target.name, "available": target.available, "why_not": target.why_not or None} for target in targets()
    )
    cache = _cache()
    threads = torch.get_num_threads()
    return Diagnosis(machine, found, threads, cache, tuple(_hints(machine, found, threads, cache)))


def _cache() -> dict[str, Any]:
    folder = cache_folder()
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    nearest = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/"))
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {"folder": str(folder), "bytes": sum(sizes), "files": len(sizes), "writable": writable}


def _hints(machine: Machine, targets: tuple[dict[str, Any], ...], threads: int, cache: dict[str, Any]) -> Iterator[str]:
    if not any(target["available"] for target in targets if target["name"].startswith("ort-")):
        yield 'no ONNX Runtime target is available; install one with: pip install "xformopt[ort]"'
    if {"onnxruntime", "onnxruntime-gpu"} <= set(machine.packages):
        yield "onnxruntime and onnxruntime-gpu overwrite each other; uninstall both, then install one."
    if threads > machine.cores:
        yield f"torch uses {threads} threads on {machine.cores} usable cores; set OMP_NUM_THREADS={machine.cores}."
    if not cache["writable"]:
        yield f"the cache folder {cache['folder']} cannot be written, so tuning is repeated; set XFORMOPT_CACHE."
    if machine.governor and machine.governor != "performance":
        yield f'the clock governor is "{machine.governor}"; "performance" makes timings steadier.'
    if machine.load_average is not None and machine.load_average > _BUSY * machine.cores:
        yield f"the machine is busy (load {machine.load_average:.1f}); timings will scatter."
