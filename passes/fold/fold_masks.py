"""Drop padding masks, when the user states that there is no padding.

    attention(q, k, v, key_mask)    ->    attention(q, k, v)
    mean_pool(x, mask)              ->    mean(x, over tokens)

**Exact** as long as the statement holds: the context must assume ``no-padding``.  The mask stays an input of the
program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, xf
from xformopt.passes.masks import evaluate_mask
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule, trace_region

__all__ = ["FoldMasks"]

ASSUMPTION = "no-padding"


@dataclass(frozen=True)
class FoldMasks(RewritePass):
    """Drop masks that only tell padding from tokens."""

    assumptions = (ASSUMPTION,)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the rules; they refuse unless the user vouches for inputs without padding."""
        stated = ASSUMPTION in context.assume

        def fold_key_mask(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.attention) or arguments(node)["key_mask"] is None:
                return None
            given = arguments(node)
            return _refusal(editor, given["key_mask"], stated) or call_with(editor, node, key_mask=None)

        def fold_pool_mask(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.mean_pool):
                return None
            given = arguments(node)
            refusal = _refusal(editor, given["mask"], stated)
            return refusal or editor.call(torch.ops.aten.mean.dim, given["x"], [1])

        return (fold_key_mask, fold_pool_mask)


def _refusal(editor: Editor, mask: fx.Node, stated: bool) -> Reject | None:
    if not stated:
        return Reject(f"the user has not stated that there is no padding (assume {ASSUMPTION})")
    region = trace_region(editor.program, (mask,), ())
    if len(region.inputs) != 1:
        what = ", ".join(region.inputs) or "no input"
        return Reject(f"the mask depends on {what}, not on one mask input alone")
    kept, padded = (evaluate_mask(editor.program, region, partial(torch.full, fill_value=fill)) for fill in (1, 0))
    if kept is None or padded is None:
        return Reject(f"the input {region.inputs[0]} is no mask")
    if {bool(kept.all()), bool(padded.all())} != {True, False} or bool(kept.any()) == bool(padded.any()):
        return Reject(f"the mask does not keep all tokens where {region.inputs[0]} marks none as padding")
    return None
