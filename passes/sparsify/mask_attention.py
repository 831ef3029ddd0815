"""Give each head a fixed mask, found on calibration data, and compute only the blocks it keeps (DAM).

    A = mean over calibration sequences of softmax(scale q k^T), by layer and head, up to a capture length
    B = (A ** power - 1) / power, brought to [0, 1] in each head;   M = B >= tau
    behind the capture length, M goes on by the diagonals and columns that it holds
    softmax(scale q k^T) v    ->    the same over the blocks of M alone

``tau`` is one number for all layers and heads: that at which ``keep`` of the visible pairs are computed.  The paper
masks single pairs; here A is summed over blocks, and what a mask hides is skipped.  Blocks on the diagonal always stay.
A mask is a constant as large as the longest input, so a length needs an upper bound.

**Approximate**, without training.  What a fixed mask cannot know is what depends on the input: a model that looks up
one token among many loses it.

Zhang et al., DAM: Dynamic Attention Mask for Long-Context Large Language Model Inference Acceleration, Findings of
ACL 2025, arXiv 2506.11104.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, xf
from xformopt.passes.sparsify.support.attention_maps import BlockMap, collect_maps
from xformopt.passes.sparsify.support.candidates import (
    bias_refusal,
    find_attentions,
    longest_of,
    refusal,
    repeat_heads,
)
from xformopt.passes.sparsify.support.static_masks import extend_mask, select_blocks
from xformopt.pipeline import Context, Effect, PassResult, RewritePass
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["MaskAttention"]


@dataclass(frozen=True)
class MaskAttention(RewritePass):
    """Give each head a fixed mask, and compute only the blocks it keeps.

    Attributes:
        keep: Share of the visible pairs of queries and keys that stay, up to the capture length.
        block: Tokens of a block.
        capture: How many tokens of a calibration sequence are looked at; None: all.
        power: Exponent of the Box-Cox transformation; 1: none, 0: logarithm.
        match: Share of a diagonal or column that a mask must keep, for it to go on behind the capture length.

    """

    keep: float = 0.25
    block: int = 32
    capture: int | None = None
    power: float = 0.5
    match: float = 0.5

    effect: ClassVar[Effect] = "approximate"
    sources: ClassVar[tuple[str, ...]] = ("Zhang et al., DAM: Dynamic Attention Mask, arXiv 2506.11104",)

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, but is {self.keep}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, but is {self.block}")
        if self.capture is not None and self.capture < 2 * self.block:
            raise ValueError(f"capture must hold two blocks of {self.block} at least, but is {self.capture}")
        if not 0 < self.match <= 1:
            raise ValueError(f"match must be above 0 and at most 1, but is {self.match}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the masks, then rewrite the attentions once each."""
        result = super().run(program, context)
        shares = [_share_of(result.program, node) for node in result.program.nodes() if _is_sparse(node)]
        computed, every = (sum(column) for column in zip(*shares, strict=True)) if shares else (0, 1)
        notes = (f"attention computed at the longest input: {computed / every:.1%}",) if shares else ()
        return PassResult(result.program, result.changed, result.fired, result.rejected, notes)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the attention."""
        every = set(find_attentions(program))
        refused = {node.name: _refusal(program, node) for node in program.nodes() if node.name in every}
        masks: dict[str, torch.Tensor] = {}
        if able := [name for name, reason in refused.items() if reason is None]:
            maps = collect_maps(program, context.calibration, able, block=self.block, capture=self.capture)
            masks = self._masks(program, maps)

        def mask_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in every:
                return None
            reason = refused[node.name]
            return Reject(reason) if reason is not None else _masked(editor, node, masks[node.name], self.block)

        return (mask_attention,)

    def _masks(self, program: Program, maps: dict[str, BlockMap]) -> dict[str, torch.Tensor]:
        named = {node.name: node for node in program.nodes()}
        masks = {}
        for name, mask in select_blocks(maps, self.keep, self.power).items():
            longest = longest_of(program, named[name])
            assert longest is not None
            masks[name] = extend_mask(mask, -(-longest // self.block), self.match, causal=maps[name].causal)
        return masks


def _refusal(program: Program, node: fx.Node) -> str | None:
    reason = refusal(program, node) or bias_refusal(program, node)
    if reason is None and longest_of(program, node) is None:
        return "nothing bounds its length, and a fixed mask ends somewhere: capture the model with a longest input"
    return reason


def _masked(editor: Editor, node: fx.Node, mask: torch.Tensor, block: int) -> fx.Node:
    given = arguments(node)
    kept = editor.parameter(f"{path_of(node) or node.name}.block_mask", mask)
    return editor.call(
        xf.block_sparse_attention,
        given["q"],
        repeat_heads(editor, given["k"], given["kv_heads"], given["heads"]),
        repeat_heads(editor, given["v"], given["kv_heads"], given["heads"]),
        kept,
        given["key_mask"],
        given["bias"],
        heads=given["heads"],
        scale=given["scale"],
        block=block,
        causal=given["causal"],
    )


def _is_sparse(node: fx.Node) -> bool:
    return node.target == xf.block_sparse_attention


def _share_of(program: Program, node: fx.Node) -> tuple[int, int]:
    """Return how many blocks an attention keeps, and how many it would see."""
    given = arguments(node)
    mask = program.parameters[str(given["block_mask"].target)]
    every = torch.ones_like(mask)
    return int(mask.sum()), int((every.tril() if given["causal"] else every).sum())
