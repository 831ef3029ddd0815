"""What passes on linear layers share: reading their constant parameters, and making wide ones of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, is_call, operand, xf
from xformopt.program import Program, path_of, value_of
from xformopt.rewrite import Editor, Reject

__all__ = [
    "LinearParts",
    "WideLinears",
    "bias_operand",
    "check_weights",
    "is_linear",
    "is_skipped",
    "linear_layers",
    "linear_parts",
    "replace_linear",
    "shared_parameter",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearParts:
    """A linear layer and its parameters: ``weight`` is ``[O, I]``, ``bias`` is ``[O]`` or None."""

    node: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def weight_name(self) -> str:
        """The weight's key among the parameters."""
        return str(operand(self.node, 1).target)

    @property
    def bias_name(self) -> str:
        """The bias's key, or one after the weight's where there is none."""
        bias = arguments(self.node)["bias"]
        if isinstance(bias, fx.Node):
            return str(bias.target)
        stem = self.weight_name.removesuffix("weight").rstrip("._")
        return f"{stem}.bias" if stem else "bias"


def linear_layers(program: Program) -> list[fx.Node]:
    """Return the linear layers whose weight is a parameter, with or without an activation, in execution order."""
    return [
        node
        for node in program.nodes()
        if is_call(node, xf.linear, xf.linear_activation) and operand(node, 1).op == "get_attr"
    ]


def is_skipped(node: fx.Node, skip: Sequence[str]) -> bool:
    """Whether the layer's module path or weight fits one of the shell patterns in ``skip``."""
    names = (path_of(node), *(str(given.target) for given in node.all_input_nodes if given.op == "get_attr"))
    return any(fnmatchcase(name, pattern) for name in names for pattern in skip)


def check_weights(program: Program, layers: Sequence[fx.Node]) -> None:
    """Raise PassError when the weight of one of ``layers`` is not finite."""
    for node in layers:
        name = str(operand(node, 1).target)
        if not bool(program.parameters[name].isfinite().all()):
            raise PassError(
                f"The weight {name} of {path_of(node) or node.name} holds NaN or infinite values, which nothing can "
                f"stand for. Restore the checkpoint, or leave the layer out with skip."
            )


def is_linear(node: object) -> bool:
    """Whether ``node`` is a linear layer of the xf dialect."""
    return is_call(node, xf.linear)


def linear_parts(editor: Editor, node: fx.Node) -> LinearParts | Reject:
    """Read the parameters of the linear layer ``node``; a reason if one of them is computed."""
    given = arguments(node)
    weight, bias = editor.constant(given["weight"]), editor.constant(given["bias"])
    if weight is None:
        return Reject(f"the weight of %{node.name} is computed, not a parameter")
    if given["bias"] is not None and bias is None:
        return Reject(f"the bias of %{node.name} is computed, not a parameter")
    return LinearParts(node, weight, bias)


def bias_operand(parts: LinearParts) -> tuple[fx.Node | None, ...]:
    """Return the node that reads the layer's bias, or nothing where there is none."""
    bias = arguments(parts.node)["bias"]
    return () if bias is None else (bias,)


def shared_parameter(parts: LinearParts) -> Reject | None:
    """Refuse to change a weight that something else reads: it would have to be stored twice."""
    weight = operand(parts.node, 1)
    if len(weight.users) > 1:
        return Reject(f"the weight {parts.weight_name} has {len(weight.users)} readers and would be stored twice")
    return None


def replace_linear(
    editor: Editor, parts: LinearParts, source: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None
) -> fx.Node:
    """Call the linear layer on ``source`` with new parameters, given in float64 and rounded here."""
    dtype = parts.weight.dtype
    args = [editor.parameter(parts.weight_name, weight.to(dtype).contiguous())]
    if bias is not None:
        args.append(editor.parameter(parts.bias_name, bias.to(dtype).contiguous()))
    replaced = editor.call(xf.linear, source, *args)
    replaced.meta["path"] = path_of(parts.node)
    return replaced


@dataclass
class WideLinears:
    """Makes one linear layer of several that read the same value.

    It remembers what it made: layers that share their parameters share the wide ones, too.
    """

    made: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def fuse(self, editor: Editor, linears: Sequence[fx.Node], label: str) -> dict[fx.Node, fx.Node] | Reject:
        """Return what replaces each of ``linears``: slices of one wide layer, placed at the first of them."""
        parts: list[LinearParts] = []
        for node in linears:
            found = linear_parts(editor, node)
            if isinstance(found, Reject):
                return found
            parts.append(found)
        if len({part.weight.dtype for part in parts}) > 1:
            return Reject("the weights have different dtypes")
        weight, bias = self._parameters(parts)
        stem = _common_stem([part.weight_name for part in parts])
        editor.at(min(linears))
        args = [editor.parameter(f"{stem}{label}.weight", weight)]
        if bias is not None:
            args.append(editor.parameter(f"{stem}{label}.bias", bias))
        source = operand(linears[0])
        wide = editor.call(xf.linear, source, *args, name=label)
        cuts = _cut(editor, wide, parts)
        for node in (wide, *cuts.values()):
            node.meta["path"] = _common_stem([f"{path_of(linear)}." for linear in linears]).rstrip(".")
        return cuts

    def _parameters(self, parts: Sequence[LinearParts]) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = tuple(name for part in parts for name in (part.weight_name, part.bias_name))
        if key not in self.made:
            weight = torch.cat([part.weight for part in parts])
            biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
            any_bias = any(part.bias is not None for part in parts)
            self.made[key] = (weight, torch.cat(biases) if any_bias else None)
        return self.made[key]


def _cut(editor: Editor, wide: fx.Node, parts: Sequence[LinearParts]) -> dict[fx.Node, fx.Node]:
    last = value_of(wide).dim() - 1
    cuts: dict[fx.Node, fx.Node] = {}
    start = 0
    for part in parts:
        end = start + len(part.weight)
        cuts[part.node] = editor.call(aten.slice.Tensor, wide, last, start, end)
        start = end
    return cuts


def _common_stem(names: Sequence[str]) -> str:
    """Return the module path that ``names`` lie in, with its dot: ``layer.0.`` for ``layer.0.q.weight`` and others."""
    paths = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return "".join(f"{part}." for part in paths[0][:shared])
