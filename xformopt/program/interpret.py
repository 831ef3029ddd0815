"""Execute a Program node by node: the oracle every other form of it is checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from xformopt.program.program import Program

__all__ = ["infer_value", "interpret"]


def interpret(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Run ``program`` on named inputs and return its named outputs.

    Values are freed after their last reader.  ``observe`` is called with every node and its value as it is computed.
    """
    values: dict[fx.Node, Any] = {}
    waiting = {node: len(node.users) for node in program.graph.nodes}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                break
            values[node] = _evaluate(program, node, inputs, values)
            if observe is not None:
                observe(node, values[node])
            for argument in {*node.all_input_nodes}:
                waiting[argument] -= 1
                if not waiting[argument]:
                    del values[argument]
    return dict(zip(program.output_names, (values[node] for node in program.results), strict=True))


def _evaluate(
    program: Program, node: fx.Node, inputs: Mapping[str, torch.Tensor], values: Mapping[fx.Node, Any]
) -> Any:
    if node.op == "placeholder":
        # views were traced on contiguous inputs; a slice of a larger tensor would not take them
        return inputs[str(node.target)].contiguous()
    if node.op == "get_attr":
        return program.parameters[str(node.target)]
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def infer_value(program: Program, node: fx.Node) -> Any:
    """Compute what ``node`` returns on fake tensors, from the ``meta["val"]`` of its arguments."""

    def known(argument: fx.Node) -> Any:
        return argument.meta["val"]

    args = fx.map_arg(node.args, known)
    kwargs = fx.map_arg(node.kwargs, known)
    assert callable(node.target)
    # without the dispatcher, some operators (pad, interpolate) are inferred in C++, which fixes every size it meets
    with program.dims.mode, enable_python_dispatcher():
        return node.target(*args, **kwargs)
