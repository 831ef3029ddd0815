"""Join a linear layer and the activation that alone reads it.

    y = f(x W^T + b)    ->    y = linear_activation(x, W, b)

**Exact**.  Run it after ``fuse-gate-up`` and ``fuse-qkv``, which look for plain linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.match import arguments, is_call, is_returned, xf
from xformopt.passes.weights import is_linear
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FuseBiasActivation"]


@dataclass(frozen=True)
class FuseBiasActivation(RewritePass):
    """Make one operator of a linear layer and its activation."""

    leaves: ClassVar[Level] = Level.TARGET

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the activation."""
        return (_fuse_bias_activation,)


def _fuse_bias_activation(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not is_call(node, xf.activation):
        return None
    given = arguments(node)
    linear = given["x"]
    if not is_linear(linear):
        return None
    if is_returned(linear):
        return Reject(f"%{linear.name} is also returned")
    if len(linear.users) > 1:
        return Reject(f"%{linear.name} has {len(linear.users) - 1} other readers")
    return editor.call(xf.linear_activation, *linear.args, function=given["function"])
