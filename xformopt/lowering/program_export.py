"""Program -> ``torch.export``: one trace with named dimensions, in which every node keeps its module path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xformopt.errors import LoweringError
from xformopt.program import Program, path_of

__all__ = ["explain", "export_program", "without_warnings"]

# sizes a trace takes apart from each other and from what models use
_TRACE_SIZES = (5, 11, 23, 47, 7, 13, 29, 53, 17, 31)


class _Interpreted(torch.nn.Module):
    """Runs a Program's graph node by node, so that a trace of it keeps each node's module path."""

    def __init__(self, program: Program, interpreter: Callable[[fx.GraphModule], fx.Interpreter]) -> None:
        super().__init__()
        self.graph_module = program.module()
        self.interpreter = interpreter
        for node in self.graph_module.graph.nodes:
            node.meta = {"val": node.meta.get("val"), "custom": {"path": path_of(node)}}

    def forward(self, *inputs: torch.Tensor) -> Any:
        with fx.traceback.preserve_node_meta():
            return self.interpreter(self.graph_module).run(*inputs)


def export_program(
    program: Program,
    purpose: str,
    *,
    interpreter: Callable[[fx.GraphModule], fx.Interpreter] = fx.Interpreter,
    device: str = "cpu",
    sizes: Mapping[str, int] | None = None,
) -> torch.export.ExportedProgram:
    """Trace ``program`` once for all sizes.

    Args:
        program: What to trace.
        purpose: What for, as errors name it.
        interpreter: Runs the graph: what it calls is what is traced.
        device: Where parameters and inputs lie.
        sizes: Sizes to trace at, which compilers take as a hint; others where left out.

    Raises:
        LoweringError: the program has no graph in which its dimensions vary.

    """
    at = _sizes(program, sizes or {})
    dims = {dim.name: torch.export.Dim(dim.name, min=dim.low, max=dim.high) for dim in program.dims}
    inputs = tuple(
        torch.zeros([at[s] if isinstance(s, str) else s for s in spec.shape], dtype=spec.dtype, device=device)
        for spec in program.inputs
    )
    axes = tuple(
        {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in program.inputs
    )
    if device != "cpu":
        moved = {name: tensor.to(device) for name, tensor in program.parameters.items()}
        program = replace(program, parameters=moved)
    module = _Interpreted(program, interpreter)
    with without_warnings(), torch.no_grad():
        try:
            return torch.export.export(module, inputs, dynamic_shapes=(axes,), strict=False)
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(
                f"The program {program.name!r} could not be traced for {purpose} with its dimensions "
                f"({', '.join(map(str, program.dims)) or 'none'}): {explain(error)}"
            ) from error


def _sizes(program: Program, wanted: Mapping[str, int]) -> dict[str, int]:
    """Return a size for every dimension: as wanted, but unequal to each other and not 1, which a trace would keep."""
    found: dict[str, int] = {}
    for index, dim in enumerate(program.dims):
        size = wanted.get(dim.name, _TRACE_SIZES[index % len(_TRACE_SIZES)])
        while size in (1, *found.values()) and dim.admits(size + 1):
            size += 1
        if not dim.admits(size):
            size = dim.low if dim.high is None else min(dim.high, max(dim.low, size))
        found[dim.name] = size
    return found


def explain(error: object) -> str:
    """Return the first paragraph of an error as one line."""
    return str(error).strip().split("\n\n")[0].replace("\n", " ")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence what torch says about its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
