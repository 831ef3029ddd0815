"""Compute ahead of time what depends on parameters alone.

    f(W1, ..., Wn)    ->    W', a new parameter        (and arange, zeros, full of known sizes)

**Exact**: the same operator runs on the same values, once.  Run it after ``canonicalize``, which makes known sizes
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.match import is_returned
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program, path_of, shape_of, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldConstants"]

aten = torch.ops.aten

# of their input, these use no more than shape, dtype and device
_READS_TYPE_ONLY = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
    }
)
_UNDEFINED = frozenset({aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default})


@dataclass(frozen=True)
class FoldConstants(RewritePass):
    """Replace what is computed from parameters alone by its value.

    Attributes:
        limit: Bytes that one result may add to the parameters it replaces.

    """

    limit: int = 1 << 20

    takes: ClassVar[Level] = Level.CAPTURED
    leaves: ClassVar[Level] = Level.CAPTURED

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule."""

        def fold_constant(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not _is_constant(editor, node):
                return None
            if is_returned(node):
                return Reject("the program returns this constant")
            added = _added_bytes(editor, node)
            if added > self.limit:
                return Reject(f"the result would add {added} bytes, more than the limit of {self.limit}")
            return editor.parameter(_name(node), _evaluate(editor, node))

        return (fold_constant,)


def _is_constant(editor: Editor, node: fx.Node) -> bool:
    """Whether ``node`` computes one tensor of known shape, the same one each time."""
    target, value = node.target, node.meta["val"]
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target in _UNDEFINED:
        return False
    if not all(isinstance(size, int) for size in shape_of(editor.program, node)):
        return False
    if target in _READS_TYPE_ONLY:
        return all(isinstance(argument.meta["val"], torch.Tensor) for argument in node.all_input_nodes)
    return all(argument.op == "get_attr" for argument in node.all_input_nodes)


def _added_bytes(editor: Editor, node: fx.Node) -> int:
    """Return the bytes of the result, less those of parameters that nothing else reads."""
    freed = [a for a in node.all_input_nodes if a.op == "get_attr" and len(a.users) == 1]
    return value_of(node).nbytes - sum(value_of(argument).nbytes for argument in freed)


def _evaluate(editor: Editor, node: fx.Node) -> torch.Tensor:
    def value(argument: fx.Node) -> Any:
        constant = editor.constant(argument)
        if constant is not None and node.target not in _READS_TYPE_ONLY:
            return constant
        return torch.empty(shape_of(editor.program, node), dtype=value_of(argument).dtype)

    assert callable(node.target)
    with torch.no_grad():
        result = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    # a view would keep the whole of what it views alive
    return result.clone(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]


def _name(node: fx.Node) -> str:
    return re.sub(r"[^\w.]", "_", f"{path_of(node)}.{node.name}").strip(".")
