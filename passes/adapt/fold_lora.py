"""Fold low-rank branches into the linear layers that they stand beside (LoRA).

    y = W x + b + s B (A x)    ->    y = (W + s B A) x + b,    s = alpha / r

The branch is known by what it computes: linear layers, and products with numbers or vectors of constants, that read the
same value as the layer whose output they are added to.  So it may stand before or behind its scale, have several
matrices or vectors between them (VeRA), and there may be several branches.

**Exact** up to the rounding of the new weight, which is computed in float64.  Run it before ``fuse-qkv`` and
``fuse-bias-activation``.
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

__all__ = ["FoldLora"]


@dataclass(frozen=True)
class FoldLora(RewritePass):
    """Make LoRA branches part of the weights that they adapt."""

    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Hu et al., LoRA, arXiv 2106.09685, section 4.1",
        "Kopiczko et al., VeRA, arXiv 2310.11454, equation 2 (vectors between the matrices)",
    )

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the addition."""
        return (_fold_lora,)


def _fold_lora(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not is_call(node, torch.ops.aten.add.Tensor):
        return None
    branch = find_branch(editor, node)
    if branch is None or isinstance(branch, Reject):
        return branch
    if branch.reads_output:
        return Reject("the branch reads the layer's output, not its input (fold-adapter-bias folds such of rank 1)")
    return fold_branch(editor, node, branch)
