"""Reading nodes: what a rule asks of the values it looks at."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.rewrite import Editor

__all__ = ["arguments", "call_with", "is_call", "is_returned", "operand", "readers", "xf"]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return a torch operator's arguments by their names in the schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def call_with(editor: Editor, node: fx.Node, **changes: Any) -> fx.Node:
    """Call the torch operator of ``node`` again with some arguments changed; what was positional stays so."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    positional = [changes.get(name, value) for name, value in zip(names, node.args, strict=False)]
    rest = set(names[len(positional) :])
    keywords: dict[str, Any] = {**node.kwargs, **{name: value for name, value in changes.items() if name in rest}}
    return editor.call(node.target, *positional, **keywords)


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """Return the argument at ``index``, which the operator's schema says is a tensor."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether ``node`` is an operator node with one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the operator nodes that read ``node``, in execution order."""
    return sorted(user for user in node.users if user.op == "call_function")


def is_returned(node: fx.Node) -> bool:
    """Whether the Program returns ``node``."""
    return any(user.op == "output" for user in node.users)
