"""Which tiles the Triton kernels take on this GPU: each kernel alone, timed with device events.

The answers are kept in one file of the cache folder, by operator, dtype and widths, for one GPU and one version of
Triton.  A length is never part of it: a model that runs at another one keeps its tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from xformopt.errors import LoweringError
from xformopt.kernels.triton_form import Tile, Trial, load_kernels, use_tiles
from xformopt.lowering.tuning_cache import TileCache

__all__ = ["CACHE_FILE", "Tried", "choose_tiles", "describe_gpu", "time_on_gpu"]

Progress = Callable[[str, int, int], None]
Clock = Callable[[Callable[[], object]], float]

# raised with what kernels compute, so that answers for others are not taken
_VERSION = 1
CACHE_FILE = "triton-tiles.json"
# a tile must beat the one kept until then by this much
_WORTH = 0.98
_WARM_UP, _ROUNDS = 3, 15
# relative L2 of a tile's result and the default's, in float32 and in the halves
_TOLERANCE = {torch.float32: 1e-5}
_TOLERANCE_OF_HALVES = 1e-2


@dataclass(frozen=True)
class Tried:
    """What was chosen for one key, its time over the default's, and a word on how.

    ``operator`` is empty where it is the cache that is spoken of.
    """

    operator: str
    key: str
    tile: Tile | None
    ratio: float | None
    note: str


def choose_tiles(
    trials: Mapping[str, Trial], *, device: str = "cuda", clock: Clock | None = None, progress: Progress
) -> tuple[dict[str, Tile], tuple[Tried, ...]]:
    """Return the fastest tile of every trial on this machine, and what was tried now.

    Args:
        trials: The choices, by key.
        device: Where to run.
        clock: Returns the milliseconds of a call; device events where left out.
        progress: Called with (what, done, total).

    Raises:
        LoweringError: no tile of a trial runs on this GPU.

    """
    cache = _cache(device)
    known, ignored = cache.read()
    tried = [Tried("", "tuning cache", None, None, ignored)] if ignored else []
    waiting = {key: trial for key, trial in trials.items() if key not in known}
    for done, (key, trial) in enumerate(waiting.items()):
        progress(f"timing tiles of {key}", done, len(waiting))
        best = _fastest(key, trial, device, clock or time_on_gpu)
        tried.append(best)
        assert best.tile is not None
        known[key] = best.tile
        cache.write(known)
    progress("timing tiles", len(waiting), len(waiting))
    return {key: known[key] for key in trials}, tuple(tried)


def time_on_gpu(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call on the GPU: the median between pairs of events."""
    for _ in range(_WARM_UP):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_ROUNDS)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(median(start.elapsed_time(end) for start, end in pairs))


def _fastest(key: str, trial: Trial, device: str, clock: Clock) -> Tried:
    kernel = load_kernels()[key.split()[0]]
    args, options = trial.operands(device)
    expected: torch.Tensor | None = None
    times: dict[Tile, float] = {}
    failed: list[str] = []
    for tile in trial.tiles:
        with use_tiles({key: tile}):
            try:
                found = kernel.plan(*args, **options).run()
            # the compiler, the launcher and the device each have errors of their own
            except Exception as error:
                failed.append(f"{tuple(tile)}: {str(error).strip().splitlines()[0]}")
                continue
            expected = found if expected is None else expected
            if _distance(found, expected) > _TOLERANCE.get(found.dtype, _TOLERANCE_OF_HALVES):
                failed.append(f"{tuple(tile)}: another result")
                continue
            times[tile] = clock(lambda: kernel.plan(*args, **options).run())
    if not times:
        raise LoweringError(f"No tile of {key} runs on {_name_of(device)}: {'; '.join(failed)}.")
    best = first = next(iter(times))
    for tile, taken in times.items():
        if taken < times[best] * _WORTH:
            best = tile
    note = f"{tuple(best)} of {len(times)} tiles timed" + (f"; not {'; '.join(failed)}" if failed else "")
    return Tried(key.split()[0], key, best, round(times[best] / times[first], 4), note)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    gap = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float("inf") if bool(gap.isnan()) else float(gap)


def describe_gpu() -> dict[str, Any]:
    """Return what of the GPU and its software decides the speed of a kernel."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def _name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the processor"


def _cache(device: str) -> TileCache[Tile]:
    import triton

    gpu = describe_gpu() if device == "cuda" else {"name": "interpreter"}
    made_for = {"version": _VERSION, "triton": triton.__version__, "torch": torch.__version__, **gpu}
    return TileCache(CACHE_FILE, Tile, made_for)
