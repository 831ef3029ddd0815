"""Owns the memory of the current process: resident now, at its peak, and the peak's reset."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_memory_bytes", "reset_peak_memory", "resident_memory_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_memory_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    in_status = _from_status("VmRSS")
    if in_status is not None:
        return in_status
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process, since its start or the last reset, in bytes."""
    in_status = _from_status("VmHWM")
    if in_status is not None:
        return in_status
    try:
        import resource
    except ImportError:  # no such module on Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    # kilobytes, except on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> bool:
    """Set the peak back to what is resident now; return whether the system allowed it (Linux does)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _from_status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
