"""Store the weights that a program rounds to two or three values as it runs in 1 or 2 bits.

    linear(x, ternary_weight(W), b)    ->    ternary_linear(x, codes(W), scale(W), b)

**Exact**: the same numbers, multiplied in the same way.  Run it after training what ``quantize-ternary`` with
``trainable`` made.  The weights are stored in few bits, and computed in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.quantize.support.ternary import packed_levels
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["PackTernary"]


@dataclass(frozen=True)
class PackTernary(RewritePass):
    """Store weights of two or three values in 1 or 2 bits, once they are trained."""

    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = ("Liu et al., Binary and Ternary Language Generation, arXiv 2306.01841",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule, which fires at the linear layer."""
        made: dict[tuple[str, int, bool], tuple[torch.Tensor, torch.Tensor]] = {}

        def pack_ternary(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.linear) or not is_call(operand(node, 1), xf.ternary_weight):
                return None
            rounding = arguments(operand(node, 1))
            weight = editor.constant(rounding["weight"])
            if weight is None:
                return Reject("the weight that is rounded is computed, not a parameter")
            name, bits, per_row = str(rounding["weight"].target), rounding["bits"], rounding["per_row"]
            key = (name, bits, per_row)
            if key not in made:
                made[key] = packed_levels(weight.detach(), bits=bits, per_row=per_row)
            codes, scale = made[key]
            stored = (editor.parameter(f"{name}.codes", codes), editor.parameter(f"{name}.scale", scale))
            bias = arguments(node)["bias"]
            return editor.call(xf.ternary_linear, operand(node), *stored, *(() if bias is None else (bias,)), bits=bits)

        return (pack_ternary,)
