"""Times on a GPU: device events around graphs of calls, so that launching from Python takes no part."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median

import torch

__all__ = ["measure_copy", "measure_products", "milliseconds"]

_WARM_UP, _ROUNDS = 3, 20
# a replay lasts at least this long, so that events are far apart
_SHORTEST_MS = 2.0
_MOST_CALLS = 50


def milliseconds(call: Callable[[], object], *, may_record: bool = True) -> tuple[float, bool]:
    """Return the median time of a call, and whether it ran from a graph: what waits for the GPU cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    if not may_record:
        return _median(call, _ROUNDS), False
    alone = _median(call, 5)
    calls = max(1, min(_MOST_CALLS, round(_SHORTEST_MS / alone)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return _median(call, _ROUNDS), False
    graph.replay()
    taken = _median(graph.replay, _ROUNDS) / calls
    del graph
    gc.collect()
    return taken, True


def _median(call: Callable[[], object], rounds: int) -> float:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(median(start.elapsed_time(end) for start, end in pairs))


def measure_copy() -> float:
    """Return bytes a second of a copy far larger than the cache, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (_median(lambda: target.copy_(source), _ROUNDS) * 1e-3)


def measure_products(dtype: torch.dtype, size: int = 8192) -> float:
    """Return operations a second of a product of square matrices of random numbers."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return float(2 * size**3 / (_median(lambda: torch.mm(a, b, out=out), _ROUNDS) * 1e-3))
