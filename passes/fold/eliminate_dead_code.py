"""Leave out what no output depends on.

    y = f(x);  z = g(x);  return y    ->    y = f(x);  return y

Operators with several results, of which some are not read, give way to those that compute only the others.

**Exact**.  Run it last; other passes leave no unused values behind, but programs read from elsewhere may hold some.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.match import arguments, xf
from xformopt.pipeline import Context, PassResult, RewritePass
from xformopt.program import Level, Program
from xformopt.rewrite import Editor, Rule

__all__ = ["EliminateDeadCode"]

aten = torch.ops.aten


@dataclass(frozen=True)
class EliminateDeadCode(RewritePass):
    """Remove unread values, unread parameters, and unread results of operators that have several."""

    takes: ClassVar[Level] = Level.CAPTURED
    leaves: ClassVar[Level] = Level.CAPTURED

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply the rules, then erase what is not read."""
        narrowed = super().run(program, context)
        result = narrowed.program.copy().drop_unused()
        before, after = (sum(1 for _ in p.graph.nodes) for p in (narrowed.program, result))
        if before == after and len(result.parameters) == len(narrowed.program.parameters):
            return narrowed
        notes = (f"{before - after} unread values",)
        return PassResult(result, True, narrowed.fired, narrowed.rejected, notes)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule."""
        return (_drop_unread_results,)


def _drop_unread_results(editor: Editor, node: fx.Node) -> fx.Node | None:
    """The only result of an operator that is read is computed by a smaller operator."""
    if node.target is not operator.getitem or not isinstance(whole := node.args[0], fx.Node):
        return None
    read = {user.args[1] for user in whole.users if user.users}
    smaller = _SMALLER.get((whole.target, node.args[1]))
    if smaller is None or read != {node.args[1]}:
        return None
    return smaller(editor, arguments(whole))


def _layer_norm(editor: Editor, given: dict[str, Any]) -> fx.Node:
    affine = (given["weight"], given["bias"], given["eps"])
    return editor.call(aten.layer_norm, given["input"], given["normalized_shape"], *affine)


def _maximum(editor: Editor, given: dict[str, Any]) -> fx.Node:
    return editor.call(aten.amax.default, given["self"], [given["dim"]], given["keepdim"])


def _minimum(editor: Editor, given: dict[str, Any]) -> fx.Node:
    return editor.call(aten.amin.default, given["self"], [given["dim"]], given["keepdim"])


def _sum(editor: Editor, given: dict[str, Any]) -> fx.Node:
    return editor.call(aten.add.Tensor, given["x"], given["residual"])


# (operator, the result that is read) -> what computes it alone
_SMALLER: dict[tuple[object, object], Callable[[Editor, dict[str, Any]], fx.Node]] = {
    (aten.native_layer_norm, 0): _layer_norm,
    (aten.max.dim, 0): _maximum,
    (aten.min.dim, 0): _minimum,
    (xf.add_layer_norm, 1): _sum,
    (xf.add_rms_norm, 1): _sum,
}
