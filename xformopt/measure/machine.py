"""Owns the description of the machine a measurement ran on, and its measured peaks.

A description says what decides speed and nothing that identifies the owner: no host, user or path.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Machine", "Peaks", "describe_machine", "measure_peaks"]

_ISA = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_PACKAGES = (
    *("numpy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "apache-tvm", "triton"),
    *("transformers", "xformopt"),
)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "KMP_AFFINITY",
    "OMP_WAIT_POLICY",
)


@dataclass(frozen=True)
class Machine:
    """What decides the speed of a run; None where the system does not say."""

    cpu: str
    architecture: str
    cores: int  # that this process may use
    physical_cores: int | None
    isa: tuple[str, ...]
    memory_bytes: int
    clock_mhz: float | None
    governor: str | None
    load_average: float | None  # over the minute before the measurement
    os: str
    python: str
    packages: dict[str, str]
    thread_variables: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "isa": list(self.isa)}


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches at best with `threads` threads, as measured."""

    threads: int
    gflops: float  # fp32 matrix multiplication, 1e9 operations per second, a multiply-add is two
    gbytes_s: float  # copy of a large array, bytes read plus bytes written


def describe_machine() -> Machine:
    """Describe the machine this process runs on."""
    cpuinfo = _cpuinfo()
    flags = frozenset((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return Machine(
        cpu=cpuinfo.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=_usable_cores(),
        physical_cores=_physical_cores(),
        isa=tuple(name for name in _ISA if name in flags),
        memory_bytes=_memory_bytes(),
        clock_mhz=_clock_mhz(),
        governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=_installed(),
        thread_variables={name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    )


def measure_peaks(threads: int, *, seconds: float = 1.2) -> Peaks:
    """Measure the machine's best fp32 matrix multiplication and copy, half of `seconds` each.

    The thread count of torch is set for the measurement and put back.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            gflops = max(_gemm_gflops(size, seconds / 4) for size in (512, 1024))
            # 128 MiB each: beyond the caches of a server
            source = torch.ones(2**25)
            destination = torch.empty_like(source)
            copy_s = _fastest_seconds(lambda: destination.copy_(source), seconds / 2)
    finally:
        torch.set_num_threads(before)
    moved = 2 * source.numel() * source.element_size()
    return Peaks(threads, gflops, gbytes_s=moved / copy_s / 1e9)


def _gemm_gflops(size: int, seconds: float) -> float:
    import torch

    a, b, out = (torch.ones(size, size) for _ in range(3))
    return 2 * size**3 / _fastest_seconds(lambda: torch.mm(a, b, out=out), seconds) / 1e9


def _fastest_seconds(call: Callable[[], object], seconds: float) -> float:
    call()
    deadline = time.perf_counter() + seconds
    fastest = float("inf")
    while fastest == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _cpuinfo() -> dict[str, str]:
    text = _read(Path("/proc/cpuinfo")) or ""
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _psutil() -> Any:
    """Return the module, or None on a bare machine that a bundle runs on."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def _physical_cores() -> int | None:
    psutil = _psutil()
    cores: int | None = psutil.cpu_count(logical=False) if psutil else None
    return cores


def _memory_bytes() -> int:
    psutil = _psutil()
    return int(psutil.virtual_memory().total) if psutil else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _clock_mhz() -> float | None:
    psutil = _psutil()
    if psutil is None:
        return None
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return round(frequency.max or frequency.current, 0) if frequency else None


def _installed() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
