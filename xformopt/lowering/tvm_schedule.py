"""The default schedule of functions no kernel scheduled: threads over the outer axes, vectors along the inner one."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["schedule_module"]

# fewer elements are not worth waking threads for
_WORTH_THREADS = 4096
_VECTOR = 16
# TVM's number of an axis along which nothing is summed
_SPATIAL = 0


def schedule_module(module: Any) -> Any:
    """Return ``module`` with every function scheduled that is not marked ``tirx.is_scheduled``."""
    from tvm import s_tir, tirx

    for name, function in list(module.functions_items()):
        if not isinstance(function, tirx.PrimFunc) or (function.attrs and "tirx.is_scheduled" in function.attrs):
            continue
        schedule = s_tir.Schedule(function)
        try:
            for block in schedule.get_child_blocks(schedule.get_sblock("root")):
                _schedule_block(schedule, block)
        except s_tir.ScheduleError:
            # a function with loops that depend on each other, such as a sort, runs as TVM wrote it
            continue
        module.update_func(name, schedule.mod["main"].with_attr("tirx.is_scheduled", True))
    return module


def _schedule_block(schedule: Any, block: Any) -> None:
    loops, axes = schedule.get_loops(block), schedule.get(block).iter_vars
    if len(loops) != len(axes):
        # loops that were rearranged already, such as those of a scan, stay as they are
        return
    is_spatial = [axis.iter_type == _SPATIAL for axis in axes]
    spatial = loops[: is_spatial.index(False) if False in is_spatial else len(loops)]
    if not spatial:
        return
    extents = [int(schedule.get(loop).extent) for loop in spatial]
    if math.prod(extents) < _WORTH_THREADS:
        return
    if len(spatial) == len(loops) and extents[-1] % _VECTOR == 0:
        outer, inner = schedule.split(spatial[-1], [None, _VECTOR])
        schedule.vectorize(inner)
        spatial[-1] = outer
    schedule.parallel(schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0])
