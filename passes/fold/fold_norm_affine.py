"""Fold the weight and bias of a norm into the linear layers that read it.

    (norm(x) * g + c) W^T + b    ->    norm(x) (W diag(g))^T + (b + W c)

**Exact** up to the rounding of the new parameters, which are computed in float64.  Run it before ``fuse-add-norm`` and
``fuse-bias-activation``, which hide norms and linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, is_returned, operand, readers, xf
from xformopt.passes.weights import LinearParts, is_linear, linear_parts, replace_linear, shared_parameter
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.program.text import target_name
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldNormAffine"]


@dataclass(frozen=True)
class FoldNormAffine(RewritePass):
    """Make norms plain: their weight and bias move into the linear layers behind them."""

    sources: ClassVar[tuple[str, ...]] = ("Ashkboos et al., SliceGPT, arXiv 2401.15024, section 3.2",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the norm."""
        return (_fold_norm_affine,)


def _fold_norm_affine(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
    if not is_call(node, xf.layer_norm, xf.rms_norm):
        return None
    given = arguments(node)
    weight, bias = given["weight"], given.get("bias")
    if (weight is None and bias is None) or not node.users:
        return None
    if given["groups"] != 1:
        return Reject("the norm is over groups of channels")
    scale, shift = editor.constant(weight), editor.constant(bias)
    if (weight is not None and scale is None) or (bias is not None and shift is None):
        return Reject("the norm's weight or bias is computed")
    linears = _linear_readers(editor, node)
    if isinstance(linears, Reject):
        return linears
    plain = editor.call(node.target, given["x"], eps=given["eps"])
    return {parts.node: _absorb(editor, parts, plain, scale, shift) for parts in linears}


def _linear_readers(editor: Editor, node: fx.Node) -> list[LinearParts] | Reject:
    """Return the linear layers that read ``node``, if they are all that do and can be changed."""
    if is_returned(node):
        return Reject("the program returns the norm")
    found: list[LinearParts] = []
    for reader in readers(node):
        if not is_linear(reader) or operand(reader) is not node:
            return Reject(f"{target_name(reader.target)} reads the norm and is no linear layer")
        parts = linear_parts(editor, reader)
        if isinstance(parts, Reject):
            return parts
        if refusal := shared_parameter(parts):
            return refusal
        found.append(parts)
    return found


def _absorb(
    editor: Editor, parts: LinearParts, plain: fx.Node, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> fx.Node:
    weight = parts.weight.double()
    bias = None if parts.bias is None else parts.bias.double()
    if shift is not None:
        moved = weight @ shift.double()
        bias = moved if bias is None else bias + moved
    if scale is not None:
        weight = weight * scale.double()
    return replace_linear(editor, parts, plain, weight, bias)
