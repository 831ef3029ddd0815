"""Where the heads of attention live in a ``[B, T, C]`` tensor, found by moving indices through the graph's views."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.probe import Probe, constant_factor, movement_chain, operator_name, scaled_chain
from xformopt.program import Shape, shape_of, value_of
from xformopt.rewrite import Editor

__all__ = ["Heads", "find_heads", "split_heads", "take_channels"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Heads:
    """A per-head tensor ``[B, H, T, D]`` seen as channels of a three-dimensional ``source``.

    Element (b, h, t, d) is ``factor * source[b, t, channels[h, d]]``, or ``source[t, b, ...]`` if ``time_first``.
    """

    source: fx.Node
    channels: torch.Tensor
    time_first: bool
    factor: float = 1.0

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.channels.shape[0]

    @property
    def width(self) -> int:
        """Channels of one head."""
        return self.channels.shape[1]

    def grouped(self) -> Heads | None:
        """Merge heads that are repeats of their neighbours (a key/value head serving several query heads)."""
        distinct = torch.unique_consecutive(self.channels, dim=0)
        if self.count % distinct.shape[0]:
            return None
        repeated = distinct.repeat_interleave(self.count // distinct.shape[0], 0)
        return replace(self, channels=distinct) if torch.equal(repeated, self.channels) else None


def find_heads(
    probe: Probe, node: fx.Node, *, transposed: bool = False, lead: Shape = (), scaled: bool = False
) -> Heads | None:
    """Find the earliest three-dimensional value whose channels the heads of ``node`` are.

    Args:
        probe: Of the program.
        node: ``[..., T, D]`` with batch and heads in front, in whatever number of axes.
        transposed: ``node`` is ``[..., D, T]``.
        lead: Leading shape to which ``node`` is broadcast (heads shared by a product).
        scaled: Look through products with numbers, and return their product as the factor.
    """
    chain = scaled_chain(node) if scaled else movement_chain(node)
    groups = math.prod(lead or shape_of(probe.program, node)[:-2])
    for source in reversed(chain):
        if not isinstance(source.meta.get("val"), torch.Tensor) or value_of(source).dim() != 3:
            continue
        moved = probe.moved(node, source)
        if moved is None:
            return None
        moved = moved.transpose(-1, -2) if transposed else moved
        moved = moved.expand(*probe.sizes_of(lead), *moved.shape[-2:]) if lead else moved
        for time_first in (False, True):
            batch = shape_of(probe.program, source)[1 if time_first else 0]
            # a batch that is spread over equal copies of one value would count as heads
            if not (sympy.sympify(groups) / sympy.sympify(batch)).is_Integer:
                continue
            channels = _channels(moved, probe.shape(source), time_first)
            if channels is not None:
                between = chain[: chain.index(source)]
                return Heads(source, channels, time_first, math.prod(constant_factor(n) or 1.0 for n in between))
    return None


def _channels(moved: torch.Tensor, shape: tuple[int, ...], time_first: bool) -> torch.Tensor | None:
    """Return the channel of every (head, feature) if batch and position pass through unchanged."""
    B, T = (shape[1], shape[0]) if time_first else shape[:2]
    if moved.shape[-2] != T or moved.numel() % (B * T * moved.shape[-1]):
        return None
    positions = moved.reshape(B, -1, T, moved.shape[-1])  # [B, H, T, D]
    rows, channels = positions // shape[2], positions % shape[2]
    b, t = torch.arange(B).view(B, 1, 1, 1), torch.arange(T).view(1, 1, T, 1)
    expected = t * B + b if time_first else b * T + t
    if not torch.equal(rows, expected.expand_as(rows)):
        return None
    first = channels[0, :, 0]
    return first if torch.equal(channels, first[None, :, None].expand_as(channels)) else None


def take_channels(editor: Editor, heads: Heads) -> fx.Node:
    """Return ``[B, T, H * D]`` with exactly the channels of ``heads`` in order.

    Channels of a linear layer are chosen in its weight, so nothing is moved at run time.
    """
    channels = heads.channels.reshape(-1)
    source = heads.source
    width = int(value_of(source).shape[2])
    if not torch.equal(channels, torch.arange(width)):
        source = _select(editor, source, channels)
    return editor.call(aten.transpose.int, source, 0, 1) if heads.time_first else source


def _select(editor: Editor, source: fx.Node, channels: torch.Tensor) -> fx.Node:
    if operator_name(source) == "linear" and (weight := editor.constant(source.args[1])) is not None:
        bias_node = source.args[2] if len(source.args) > 2 else None
        bias = editor.constant(bias_node)
        if bias_node is None or bias is not None:
            suffix = _suffix(channels)
            parts = [editor.parameter(f"{source.args[1].target}{suffix}", weight[channels].contiguous())]  # type: ignore[union-attr]
            if bias is not None:
                parts.append(editor.parameter(f"{bias_node.target}{suffix}", bias[channels].contiguous()))  # type: ignore[union-attr]
            return editor.call(xf.linear, source.args[0], *parts)
    low, count = int(channels[0]), len(channels)
    if torch.equal(channels, torch.arange(low, low + count)):
        return editor.call(aten.slice.Tensor, source, 2, low, low + count)
    index = editor.parameter(f"channels{_suffix(channels)}", channels.contiguous())
    return editor.call(aten.index_select.default, source, 2, index)


def _suffix(channels: torch.Tensor) -> str:
    return f"_{int(channels[0])}_{int(channels[-1]) + 1}"


def split_heads(editor: Editor, merged: fx.Node, heads: int) -> fx.Node:
    """``[B, T, H * D]`` to ``[B, H, T, D]``."""
    parts = editor.call(aten.unflatten.int, merged, 2, [heads, int(value_of(merged).shape[2]) // heads])
    return editor.call(aten.transpose.int, parts, 1, 2)
