"""Fold constant factors into the weights of linear layers and the scale of attention.

    (x W^T + b) * s         ->    x (diag(s) W)^T + s b          (LayerScale, too: one s per channel)
    (x * s) W^T + b         ->    x (W diag(s))^T + b
    attention(q * s, k)     ->    attention(q, k), its scale times s

**Exact** up to the rounding of the new parameters, which are computed in float64.  Run it before ``fuse-qkv`` and
``fuse-bias-activation``, which hide the linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, is_returned, operand, readers, xf
from xformopt.passes.weights import is_linear, linear_parts, replace_linear, shared_parameter
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program, shape_of, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldScale"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldScale(RewritePass):
    """Move constant factors into weights and attention scales."""

    sources: ClassVar[tuple[str, ...]] = ("Touvron et al. (LayerScale), arXiv 2103.17239",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the rules; attention comes first, as it takes a factor without changing a weight."""
        return (_scale_attention, _scale_outputs, _scale_inputs)


@dataclass(frozen=True)
class _Product:
    """``x * factor``, where ``factor`` is a number or one per channel, in float64."""

    x: fx.Node
    factor: torch.Tensor


def _product(editor: Editor, node: object) -> _Product | None:
    """Read a product with, or quotient by, a constant that has no axis but the last."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return None
    orders = [node.args[:2], node.args[1::-1]] if node.target is aten.mul.Tensor else [node.args[:2]]
    for x, other in orders:
        factor = _factor(editor, other)
        if not isinstance(x, fx.Node) or factor is None or not _keeps_type(editor.program, x, node):
            continue
        factor = factor if node.target is aten.mul.Tensor else 1 / factor
        return _Product(x, factor) if factor.isfinite().all() else None
    return None


def _factor(editor: Editor, value: object) -> torch.Tensor | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    constant = editor.constant(value)
    if constant is None or not constant.is_floating_point() or constant.shape[:-1].numel() != 1:
        return None
    return constant.double().reshape(()) if constant.numel() == 1 else constant.double().reshape(-1)


def _keeps_type(program: Program, x: fx.Node, product: fx.Node) -> bool:
    return value_of(x).dtype == value_of(product).dtype and shape_of(program, x) == shape_of(program, product)


def _scale_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """A factor of queries or keys is a factor of the logits; a rotation lets it pass."""
    if not is_call(node, xf.attention):
        return None
    given = arguments(node)
    for role in ("q", "k"):
        rotated = is_call(given[role], xf.rope)
        product = _product(editor, operand(given[role]) if rotated else given[role])
        if product is None:
            continue
        if product.factor.dim():
            return Reject(f"the factor of {role} differs between channels")
        x = call_with(editor, given[role], x=product.x) if rotated else product.x
        return call_with(editor, node, **{role: x, "scale": given["scale"] * product.factor.item()})
    return None


def _scale_outputs(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """A product of a linear layer with a constant."""
    product = _product(editor, node)
    if product is None or not is_linear(linear := product.x):
        return None
    if not product.factor.dim() and _is_attended(node):
        return None
    if len(linear.users) > 1:
        return Reject(f"%{linear.name} has other readers")
    parts = linear_parts(editor, linear)
    if isinstance(parts, Reject):
        return parts
    if refusal := shared_parameter(parts):
        return refusal
    weight = parts.weight.double() * product.factor.unsqueeze(-1)
    bias = None if parts.bias is None else parts.bias.double() * product.factor
    return replace_linear(editor, parts, operand(linear), weight, bias)


def _is_attended(node: fx.Node) -> bool:
    """Whether attention takes the factor: everything that reads the product uses it as queries or keys."""

    def takes(reader: fx.Node) -> bool:
        if is_call(reader, xf.rope):
            return _is_attended(reader)
        return is_call(reader, xf.attention) and node not in (
            value for name, value in arguments(reader).items() if name not in ("q", "k")
        )

    return not is_returned(node) and all(map(takes, readers(node)))


def _scale_inputs(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
    """Linear layers that read a product with a constant; it fires at the product."""
    product = _product(editor, node)
    if product is None or not any(is_linear(reader) for reader in readers(node)):
        return None
    if is_returned(node) or not all(is_linear(r) and operand(r) is node for r in readers(node)):
        return Reject("the product is read by more than linear layers")
    replaced: dict[fx.Node, fx.Node] = {}
    for reader in readers(node):
        parts = linear_parts(editor, reader)
        if isinstance(parts, Reject):
            return parts
        if refusal := shared_parameter(parts):
            return refusal
        bias = None if parts.bias is None else parts.bias.double()
        replaced[reader] = replace_linear(editor, parts, product.x, parts.weight.double() * product.factor, bias)
    return replaced
