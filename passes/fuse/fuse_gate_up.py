"""Compute both halves of a gated linear unit by a single wide linear layer.

    f(x Wg^T + bg) * (x Wu^T + bu)    ->    gate, up = split(x [Wg; Wu]^T + [bg; bu]);  f(gate) * up

**Exact**: every output is the same sum of products.  Run it after lifting; before or after ``fold-norm-affine``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.match import arguments, is_call, operand, readers, xf
from xformopt.passes.weights import WideLinears, is_linear
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FuseGateUp"]


@dataclass(frozen=True)
class FuseGateUp(RewritePass):
    """Make one linear layer of the gate and up projections of a gated linear unit."""

    sources: ClassVar[tuple[str, ...]] = ("Shazeer, arXiv 2002.05202",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the first of the two linear layers."""
        wide = WideLinears()

        def fuse_gate_up(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
            unit = next((r for r in readers(node) if is_call(r, xf.glu)), None)
            if not is_linear(node) or unit is None:
                return None
            gate, up = (arguments(unit)[name] for name in ("gate", "up"))
            if gate is up:
                return Reject("gate and up are the same value")
            if not is_linear(gate) or not is_linear(up):
                return Reject("one of gate and up is no linear layer")
            if operand(gate) is not operand(up):
                return Reject("gate and up read different values")
            return wide.fuse(editor, [gate, up], "gate_up") if node is min(gate, up) else None

        return (fuse_gate_up,)
