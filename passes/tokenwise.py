"""What works on each token alone, and how a pass over tokens says that it cannot."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from xformopt.match import arguments
from xformopt.program import Program, path_of, shape_of
from xformopt.program.dims import Size
from xformopt.program.text import target_name

__all__ = ["NORMS", "RefusalError", "is_layer", "is_tokenwise", "place_of", "tokens_of", "xf_name"]

aten = torch.ops.aten

NORMS = frozenset({"layer_norm", "rms_norm"})
_ADDED_NORMS = frozenset({"add_layer_norm", "add_rms_norm"})
_LAYERS = frozenset({"linear", "linear_activation", "activation", "glu", "quantized_linear", "weight_only_linear"})
_COPIES = frozenset({aten.clone.default, aten._to_copy.default, aten.contiguous.default})
_ALONG = frozenset({aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.cat.default})


class RefusalError(Exception):
    """A program that a pass over tokens cannot change: the value that shows it, and why."""

    def __init__(self, node: fx.Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def tokens_of(program: Program, node: fx.Node) -> Size | None:
    """Return the size of axis 1 of a floating-point value ``[B, T, C]``, or None for any other value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        return None
    return shape_of(program, node)[1]


def is_tokenwise(node: fx.Node, tokens: Iterable[fx.Node]) -> bool:
    """Whether ``node`` computes each token from itself alone, given which of its operands hold tokens ``[B, T, C]``."""
    held = set(tokens)
    others = [a for a in node.all_input_nodes if a not in held]
    if xf_name(node) in NORMS | _LAYERS | _ADDED_NORMS:
        return node.args[0] in held and all(other.op == "get_attr" for other in others)
    if not isinstance(node.target, torch._ops.OpOverload):
        return target_name(node.target) == "size.getitem" and not others
    if node.target in _COPIES:
        return True
    if node.target in _ALONG:
        return arguments(node)["dim"] in (2, -1) and not others
    return torch.Tag.pointwise in node.target.tags and all(map(_is_for_every_token, others))


def is_layer(node: fx.Node, tokens: Iterable[fx.Node]) -> bool:
    """Whether ``node`` is a linear layer or an activation on tokens, where most of the work is."""
    held = set(tokens)
    others = [a for a in node.all_input_nodes if a not in held]
    return xf_name(node) in _LAYERS and node.args[0] in held and all(other.op == "get_attr" for other in others)


def xf_name(node: fx.Node) -> str:
    """Return the name of an xf operator, or nothing for any other node."""
    is_ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "xf"
    return str(node.target._opname) if is_ours else ""  # type: ignore[union-attr]


def place_of(node: fx.Node | None) -> str:
    """Return where a value is, for a report."""
    return "" if node is None else path_of(node) or node.name


def _is_for_every_token(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dim() < 2 or value.shape[-2] == 1)
