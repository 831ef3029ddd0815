"""An attention that may be linearized: what it reads, what it may see, and why it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from xformopt.kernels.chunks import CHUNK
from xformopt.match import arguments, call_with, is_call, operand, xf
from xformopt.pipeline import Context
from xformopt.program import Program, example_sizes, interpret, path_of, sample_inputs, shape_of, value_of
from xformopt.rewrite import Editor, Reject

__all__ = [
    "Site",
    "is_too_short",
    "projected_from",
    "projection_of",
    "read_site",
    "relearned",
    "seen_value",
    "spread",
    "unexpressed_bias",
    "with_projection",
    "without_rotation",
]

aten = torch.ops.aten
# what may stand between a linear layer and attention
_AFTER = (xf.rope, xf.rms_norm)


@dataclass(frozen=True)
class Site:
    """An ``xf.attention`` of queries and keys of one sequence.

    Attributes:
        node: The attention.
        q: Queries, ``[B, T, heads * depth]``.
        k: Keys, ``[B, T, kv_heads * depth]``.
        v: Values, ``[B, T, kv_heads * width]``.
        key_mask: Which keys exist, ``[B, T]``, or None.
        bias: What is added to the logits, or None.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        scale: Factor of the logits.
        causal: Whether a token sees none after it.

    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    key_mask: fx.Node | None
    bias: fx.Node | None
    heads: int
    kv_heads: int
    scale: float
    causal: bool

    @property
    def depth(self) -> int:
        """Channels of a head of queries and keys."""
        return int(value_of(self.q).shape[2]) // self.heads

    @property
    def width(self) -> int:
        """Channels of a head of values."""
        return int(value_of(self.v).shape[2]) // self.kv_heads

    def length(self, program: Program, sizes: dict[str, int]) -> int:
        """Return how many tokens there are where dimensions have these sizes."""
        return int(program.dims.evaluate(shape_of(program, self.q)[1], sizes))


def read_site(program: Program, node: fx.Node) -> Site | Reject:
    """Return what a linear form has to know of an attention; a reason where none can express it."""
    given = arguments(node)
    if given["key_log_size"] is not None:
        return Reject("its keys stand for several tokens each (key_log_size), which no linear form here can express")
    if given["window_left"] >= 0 or given["window_right"] >= 0:
        sides = f"{given['window_left']} to the left and {given['window_right']} to the right"
        return Reject(f"its mask is a sliding window ({sides}), which no linear form can express; its cost is local")
    if shape_of(program, given["q"])[1] != shape_of(program, given["k"])[1]:
        return Reject("its queries and keys are those of different sequences")
    names = ("q", "k", "v", "key_mask", "bias", "heads", "kv_heads", "scale", "causal")
    return Site(node, **{name: given[name] for name in names})


def unexpressed_bias(site: Site, bias: Literal["refuse", "drop"]) -> str | None:
    """Return why a form without biases cannot stand for a site that has one, unless it is to be dropped."""
    if site.bias is None or bias == "drop":
        return None
    return (
        f"an additive bias of the logits, %{site.bias.name}, cannot be expressed; bias=drop leaves it out, for "
        f"training to make up for"
    )


def is_too_short(site: Site, length: int) -> str | None:
    """Return why a causal form is of no use at a length: it is computed by whole chunks."""
    if site.causal and length < CHUNK:
        return f"its sequences of {length} tokens are shorter than a chunk of {CHUNK}, which is computed as a whole"
    return None


def spread(editor: Editor, site: Site, x: fx.Node) -> fx.Node:
    """Return keys or values with one head for each query head: each repeated as often as it serves one."""
    if site.heads == site.kv_heads:
        return x
    depth = int(value_of(x).shape[2]) // site.kv_heads
    channels = torch.arange(site.kv_heads * depth).reshape(site.kv_heads, depth)
    repeated = channels.repeat_interleave(site.heads // site.kv_heads, 0).flatten()
    index = editor.parameter(f"repeated_{site.heads}_{site.kv_heads}_{depth}", repeated)
    return editor.call(aten.index_select.default, x, 2, index)


def without_rotation(x: fx.Node) -> fx.Node:
    """Return queries or keys as they are before rotary embedding."""
    while is_call(x, xf.rope):
        x = operand(x)
    return x


def relearned(
    editor: Editor, site: Site, trained: Mapping[str, torch.Tensor], roles: Sequence[str] = ("q", "k", "v")
) -> tuple[Site, list[str]]:
    """Compute queries, keys and values by linear layers of the site's own, whose parameters can be trained.

    Args:
        editor: Inserts the layers.
        site: Whose.
        trained: Parameters of earlier training, by the names returned.
        roles: Which of the three.

    Returns:
        The site as it reads from the new layers, and the names of their parameters.  What is not a linear layer, or
        one and its rotary embedding or norm, stays as it is.

    """
    names: list[str] = []
    made: dict[str, Any] = {}
    for role in roles:
        x: fx.Node = getattr(site, role)
        if (linear := projection_of(editor, x)) is not None:
            start = {place: value for place, value in zip(("weight", "bias"), linear, strict=True) if value is not None}
            stored = {f"{site.node.name}.{role}.{place}": value for place, value in start.items()}
            made[role] = with_projection(editor, x, {**stored, **{n: trained[n] for n in stored if n in trained}})
            names += stored
    return replace(site, **made), names


def projection_of(editor: Editor, x: fx.Node) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return weight and bias of the linear layer that makes ``x``, perhaps by way of rotary embedding or norm.

    Of a layer that makes several values at once, the rows that make this one.
    """
    while is_call(x, *_AFTER):
        x = operand(x)
    linear = _linear_of(x)
    if linear is None:
        return None
    given = arguments(linear)
    weight, bias = editor.constant(given["weight"]), editor.constant(given["bias"])
    if weight is None or (given["bias"] is not None and bias is None):
        return None
    if linear is not x:
        rows = slice(arguments(x)["start"], arguments(x)["end"])
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return weight, bias


def projected_from(x: fx.Node) -> fx.Node | None:
    """Return what that linear layer reads."""
    while is_call(x, *_AFTER):
        x = operand(x)
    linear = _linear_of(x)
    return None if linear is None else operand(linear)


def with_projection(editor: Editor, x: fx.Node, parameters: Mapping[str, torch.Tensor]) -> fx.Node:
    """Compute ``x`` again by another linear layer: weight and, where there is one, bias, by their names."""
    linear = _linear_of(x)
    if linear is None:
        made = call_with(editor, x, x=with_projection(editor, operand(x), parameters))
    else:
        stored = (editor.parameter(name, value.contiguous()) for name, value in parameters.items())
        made = editor.call(xf.linear, operand(linear), *stored)
    made.meta["path"] = path_of(x)
    return made


def seen_value(program: Program, node: fx.Node, context: Context) -> torch.Tensor:
    """Return a value on the first batch of calibration data, or on drawn inputs where there is none."""
    batch = next(iter(context.calibration), None) or sample_inputs(program, example_sizes(program))
    found: dict[str, torch.Tensor] = {}

    def observe(each: fx.Node, value: Any) -> None:
        if each.name == node.name:
            found[each.name] = value

    if node.op == "placeholder":
        return batch[str(node.target)]
    if node.op == "get_attr":
        return program.parameters[str(node.target)]
    interpret(program, batch, observe=observe)
    return found[node.name]


def _linear_of(x: fx.Node) -> fx.Node | None:
    """Return the linear layer that ``x`` is the result of, whole or a range of its channels."""
    is_range = is_call(x, aten.slice.Tensor) and arguments(x)["dim"] in (2, -1) and arguments(x)["step"] == 1
    linear = operand(x) if is_range else x
    return linear if is_call(linear, xf.linear) else None
