"""Layers: the residual blocks between which a program is nothing but a stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import is_call, xf
from xformopt.program import Program, shape_of
from xformopt.reconstruction import Block, cut_blocks

__all__ = [
    "Layer",
    "find_layers",
    "hidden_state",
    "layer_linears",
    "refuse_too_many",
    "remove_layers",
    "require_layers",
]


@dataclass(frozen=True)
class Layer:
    """A residual block: attention or another mixer of positions, and the branches that follow it.

    Where norms stand behind the sums, a layer begins with the norm of the one before it.

    Attributes:
        name: The module path of its last sum.
        stream: Name of the value that comes in.
        result: Name of its last sum.
        nodes: Names of its operators, in execution order.

    """

    name: str
    stream: str
    result: str
    nodes: tuple[str, ...]


def find_layers(program: Program) -> list[Layer]:
    """Return the layers of a lifted program in execution order."""
    named = {node.name: node for node in program.graph.nodes}
    found = (_layer(program, block, named) for block in cut_blocks(program))
    return [layer for layer in found if layer is not None]


def require_layers(program: Program, least: int, what: str) -> list[Layer]:
    """Return the layers of a program that has to have some.

    Args:
        program: A lifted program.
        least: How many there have to be.
        what: What they are needed for, for the message.

    Raises:
        PassError: there are fewer.

    """
    layers = find_layers(program)
    if len(layers) >= least:
        return layers
    raise PassError(
        f"The program {program.name!r} has too few layers {what}: looked for {least} residual blocks, each from a "
        f"stream to a sum of its shape, and found {len(layers)}"
        f"{': ' + ', '.join(layer.name for layer in layers) if layers else ''}. Run the pass before those that fuse "
        f"sums with norms."
    )


def refuse_too_many(what: str, program: Program, wanted: int) -> None:
    """Raise PassError where so many layers cannot go, since one at least has to stay."""
    layers = require_layers(program, 2, f"for {what}")
    if wanted >= len(layers):
        raise PassError(
            f"The budget cannot be met: {wanted} layers are to go, and the program {program.name!r} has "
            f"{len(layers)}, of which one stays. At best, {len(layers) - 1} go."
        )


def remove_layers(program: Program, removed: Iterable[Layer]) -> Program:
    """Return ``program`` with the results of layers replaced by what came into them."""
    result = program.copy()
    named = {node.name: node for node in result.graph.nodes}
    skipped: dict[str, str] = {}
    for layer in removed:
        skipped[layer.result] = layer.stream
    for gone, stream in skipped.items():
        while stream in skipped:
            stream = skipped[stream]
        named[gone].replace_all_uses_with(named[stream])
    return result.drop_unused()


def hidden_state(program: Program, layers: Iterable[Layer]) -> str:
    """Return the name of the last hidden state: the norm behind the last layer, or that layer's result."""
    *_, last = layers
    result = next(node for node in program.nodes() if node.name == last.result)
    behind, *others = result.users
    return behind.name if not others and is_call(behind, xf.layer_norm, xf.rms_norm) else result.name


def layer_linears(program: Program, layer: Layer) -> list[fx.Node]:
    """Return the linear layers of a layer that alone read their constant weight, in execution order."""
    inside = set(layer.nodes)
    return [
        node
        for node in program.nodes()
        if node.name in inside
        and is_call(node, xf.linear)
        and all(value.op == "get_attr" and len(value.users) == 1 for value in node.all_input_nodes[1:])
    ]


def _layer(program: Program, block: Block, named: dict[str, fx.Node]) -> Layer | None:
    result = named[block.nodes[-1]]
    if not is_call(result, torch.ops.aten.add.Tensor) or block.name == "output" or result.name not in block.outputs:
        return None
    streams = [name for name in block.inputs if _is_stream(program, named[name], result)]
    # a second value of the stream's shape, such as an encoder's result, is read from further away
    stream = max(streams, key=lambda name: named[name], default=None)
    return None if stream is None else Layer(block.name, stream, result.name, block.nodes)


def _is_stream(program: Program, value: fx.Node, result: fx.Node) -> bool:
    if value.op != "call_function" or not isinstance(value.meta["val"], torch.Tensor):
        return False
    return shape_of(program, value) == shape_of(program, result)
