"""Fold shifts that depend on the token into the linear layer that they are added behind (AdapterBias).

    h = W a + b + (w^T a + beta) v                 ->    h = (W + v w^T) a + (b + beta v)
    h = y + (w^T y + beta) v,   y = W a + b        ->    h = (I + v w^T) W a + (I + v w^T) b + beta v

The first is what was published: the scalar is computed from the intermediate activation, which the second layer of the
FFN reads; the second is the same from that layer's output.  Which of them stands there is told by what is read.

**Exact** up to the rounding of the new weight and bias, which are computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import is_call
from xformopt.passes.adapt.support.branches import find_branch, fold_branch
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldAdapterBias"]


@dataclass(frozen=True)
class FoldAdapterBias(RewritePass):
    """Make shifts along one vector part of the weight and bias behind which they are added."""

    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Fu et al., AdapterBias, arXiv 2205.00305, section 3.2",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the addition."""
        return (_fold_adapter_bias,)


def _fold_adapter_bias(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not is_call(node, torch.ops.aten.add.Tensor):
        return None
    branch = find_branch(editor, node)
    if branch is None or isinstance(branch, Reject):
        return branch
    if branch.narrowest > 1:
        return Reject(f"the branch is {branch.narrowest} wide, and no multiple of one vector (fold-lora folds it)")
    return fold_branch(editor, node, branch)
