"""Execute a Program node by node: the oracle every other form of it is checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from xformopt.program.program import Program

__all__ = ["call", "evaluate", "infer_value", "interpret"]

aten = torch.ops.aten


def interpret(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Run ``program`` on named inputs, defaults where they are left out, and return its named outputs.

    Values are freed after their last reader.  ``observe`` is called with every node and its value as it is computed.
    """
    values: dict[fx.Node, Any] = {}
    inputs = program.completed(inputs)
    waiting = {node: len(node.users) for node in program.graph.nodes}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                break
            values[node] = evaluate(program, node, inputs, values)
            if observe is not None:
                observe(node, values[node])
            for argument in {*node.all_input_nodes}:
                waiting[argument] -= 1
                if not waiting[argument]:
                    del values[argument]
    return dict(zip(program.output_names, (values[node] for node in program.results), strict=True))


def evaluate(program: Program, node: fx.Node, inputs: Mapping[str, torch.Tensor], values: Mapping[fx.Node, Any]) -> Any:
    """Return the value of one node: an input, a parameter, or what its operator makes of ``values``."""
    if node.op == "placeholder":
        return inputs[str(node.target)]
    if node.op == "get_attr":
        return program.parameters[str(node.target)]
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    return call(node.target, args, kwargs)


def call(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the operator of a node on real values.

    A view was traced on the strides of the example; a slice of something larger, or a kernel that lays its result out
    in another order than shape inference says, may need a copy.
    """
    target = aten.reshape.default if target is aten.view.default else target
    assert callable(target)
    return target(*args, **kwargs)


def infer_value(program: Program, node: fx.Node) -> Any:
    """Compute what ``node`` returns on fake tensors, from the ``meta["val"]`` of its arguments."""

    def known(argument: fx.Node) -> Any:
        return argument.meta["val"]

    args = fx.map_arg(node.args, known)
    kwargs = fx.map_arg(node.kwargs, known)
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        operands = [known(argument) for argument in node.all_input_nodes]
        key = (node.target, str(fx.map_arg((node.args, node.kwargs), lambda argument: id(known(argument)))))
        return program.dims.remember(
            key, operands, operands[0].numel(), lambda: _infer(program, node.target, args, kwargs)
        )
    return _infer(program, node.target, args, kwargs)


def _infer(program: Program, target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    assert callable(target)
    # without the dispatcher, some operators (pad, interpolate) are inferred in C++, which fixes every size it meets
    with program.dims.mode, enable_python_dispatcher():
        return target(*args, **kwargs)
