"""Put the channels of Mamba-2's scans in an order in which those of like size are neighbours (Quamba2).

The largest |x| of each channel at the scan's input is recorded.  Channels are sorted by it inside each head, heads with
like profiles are put side by side, and with them: rows of the projections of x, gate and step sizes, channels of the
convolution, rates and skips of heads, the norm's weight, and columns of the output projection.

**Exact**: the same sums in another order; needs calibration data.  Run it before ``quantize-state-space``, whose groups
of channels are contiguous then.  Mamba-1 has no heads, and none of this is defined there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, operand, xf
from xformopt.observers import observe_ranges
from xformopt.passes.quantize.support.state_groups import group_channels
from xformopt.passes.quantize.support.state_space import StateSpaceLayer, match_layer
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["SortStateChannels"]


@dataclass(frozen=True)
class SortStateChannels(RewritePass):
    """Sort the channels of state-space layers, so that those that will share a scale are neighbours.

    Attributes:
        head_groups: Groups of heads with like profiles.
        channel_groups: Groups of channels in each group of heads.

    """

    head_groups: int = 4
    channel_groups: int = 4

    sources: ClassVar[tuple[str, ...]] = ("Chiang et al., Quamba2, arXiv 2503.22879, section 4.2",)

    def __post_init__(self) -> None:
        if self.head_groups < 1 or self.channel_groups < 1:
            raise ValueError("head_groups and channel_groups must be at least 1")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Record the channels' maxima; return the one rule, which fires at the scan."""
        wanted = [operand(node).name for node in program.nodes() if is_call(node, xf.ssd)]
        if not wanted:
            return (_explain_mamba1,)
        ranges = observe_ranges(program, context.calibration, wanted, granularity="channel", progress=context.progress)

        def sort_channels(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
            if not is_call(node, xf.ssd):
                return _explain_mamba1(editor, node)
            if (found := ranges.get(operand(node).name)) is None:
                return Reject("its channels are sorted already")
            given = arguments(node)
            groups = group_channels(
                torch.maximum(found.low.abs(), found.high.abs()),
                heads=given["heads"],
                head_groups=self.head_groups,
                channel_groups=self.channel_groups,
            )
            heads, channels = groups.permutation(given["groups"])
            if torch.equal(channels, torch.arange(len(channels))):
                return Reject("its channels are sorted already")
            layer = match_layer(node)
            return layer if isinstance(layer, Reject) else _permuted(editor, layer, heads, channels)

        return (sort_channels,)


def _explain_mamba1(editor: Editor, node: fx.Node) -> Reject | None:
    if is_call(node, xf.selective_scan):
        return Reject("Mamba-1 has no heads to sort channels in")
    return None


def _permuted(
    editor: Editor, layer: StateSpaceLayer, heads: torch.Tensor, channels: torch.Tensor
) -> Mapping[fx.Node, fx.Node]:
    """Compute the layer again with its parameters in the new order."""
    new: dict[fx.Node, fx.Node] = {}
    for axes, order in ((layer.channels, channels), (layer.heads, heads)):
        for parameter, axis in axes.items():
            name = str(parameter.target)
            new[parameter] = editor.parameter(name, _reordered(editor.program.parameters[name], axis, order))
    # the whole layer is placed where its result is, behind everything it reads
    editor.at(layer.output)
    for node in layer.nodes:
        changed = {name: fx.map_arg(value, lambda old: new.get(old, old)) for name, value in arguments(node).items()}
        new[node] = call_with(editor, node, **changed)
        new[node].meta["path"] = path_of(node)
    return {layer.output: new[layer.output]}


def _reordered(value: torch.Tensor, axis: int, order: torch.Tensor) -> torch.Tensor:
    """Put what comes first along ``axis`` in another order; what follows (B and C) stays."""
    rest = torch.arange(len(order), value.shape[axis])
    return value.index_select(axis, torch.cat((order, rest))).contiguous()
