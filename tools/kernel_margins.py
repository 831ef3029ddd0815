"""When a Triton kernel takes more of a GPU than is recorded."""

from __future__ import annotations

__all__ = ["LIMITS", "MARGIN", "worse"]

# by how much a kernel may differ from the record; a compiler of another version moves registers a little
MARGIN = {"registers": 16, "stack_bytes": 64, "shared_bytes": 0}
# bytes of shared memory that one block may have, by architecture
LIMITS = {"sm_80": 166912, "sm_90": 232448}


def worse(recorded: dict[str, dict[str, int]], found: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for every launch that takes more than is recorded, is not recorded, or does not fit."""
    lines = [f"{name}: not recorded" for name in found if name not in recorded]
    lines += [f"{name}: gone" for name in recorded if name not in found]
    for name, now in found.items():
        before, most = recorded.get(name, now), LIMITS[name.rpartition(": ")[2]]
        lines += [
            f"{name}: {what} {before[what]} -> {now[what]}"
            for what, margin in MARGIN.items()
            if now[what] > before[what] + margin
        ]
        if now["shared_bytes"] > most:
            lines.append(f"{name}: {now['shared_bytes']} bytes of shared memory, of {most}")
    return lines
