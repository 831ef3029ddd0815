"""Join a residual sum and the norm that reads it.

    s = x + r;  n = layer_norm(s)    ->    n, s = add_layer_norm(x, r)        (and the same with rms_norm)

**Exact**.  Run it after ``fold-norm-affine`` and ``fuse-qkv``, which look for the plain norm.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program, shape_of, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FuseAddNorm"]


_FUSED = {xf.layer_norm: xf.add_layer_norm, xf.rms_norm: xf.add_rms_norm}


@dataclass(frozen=True)
class FuseAddNorm(RewritePass):
    """Make one operator of a residual sum and its norm."""

    leaves: ClassVar[Level] = Level.TARGET

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the norm."""
        return (_fuse_add_norm,)


def _fuse_add_norm(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
    fused = next((fused for norm, fused in _FUSED.items() if is_call(node, norm)), None)
    if fused is None:
        return None
    given = arguments(node)
    total = given["x"]
    if not is_call(total, torch.ops.aten.add.Tensor):
        return None
    if refusal := _refusal(editor.program, total, given):
        return refusal
    affine = [given[name] for name in ("weight", "bias") if name in given]
    # the sum's other readers may come before the norm
    both = editor.at(total).call(fused, *total.args[:2], *affine, eps=given["eps"])
    normalized, summed = (editor.call(operator.getitem, both, index) for index in (0, 1))
    return {node: normalized, total: summed}


def _refusal(program: Program, total: fx.Node, given: Mapping[str, object]) -> Reject | None:
    x, residual = total.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(residual, fx.Node):
        return Reject("a number is added, not a residual")
    if arguments(total)["alpha"] != 1:
        return Reject("the residual is scaled (alpha)")
    if given["groups"] != 1:
        return Reject("the norm is over groups of channels")
    if shape_of(program, x) != shape_of(program, residual):
        return Reject(f"the sum broadcasts {shape_of(program, x)} and {shape_of(program, residual)}")
    if value_of(x).dtype != value_of(residual).dtype:
        return Reject(f"the sum mixes {value_of(x).dtype} and {value_of(residual).dtype}")
    if any(isinstance(affine := given.get(name), fx.Node) and affine.op != "get_attr" for name in ("weight", "bias")):
        return Reject("the norm's weight or bias is computed")
    return None
