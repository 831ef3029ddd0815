"""Give each head a fixed mask, found on calibration data, and compute only the blocks it keeps (DAM).

    A = mean over calibration sequences of softmax(scale q k^T), by layer and head, up to a capture length
    B = (A ** power - 1) / power, brought to [0, 1] in each head;   M = B >= tau
    behind the capture length, M goes on by the diagonals and columns that it holds
    softmax(scale q k^T) v    ->    the same over the blocks of M alone

``tau`` is one number for all layers and heads: that at which ``keep`` of the visible pairs are computed.  The paper
masks single pairs; here A is summed over blocks, and what a mask hides is skipped.  Blocks on the diagonal always stay.
A mask is a constant as large as the longest input, so a length needs an upper bound.

Where a share is asked for, and not a threshold, the paper's B is a poor measure: brought to [0, 1] in each head, the
flat map of a head that looks everywhere is as strong as the few peaks of another, and takes its share.  So B is one of
three scores that blocks may be ranked by:

- ``amplified``: B, the paper's.
- ``mass``: A itself, without the last two steps, so that the least attention is lost over all heads together.
- ``answer``: ours, the default: how far the program's answer moves without the block, to first order.  It knows which
  queries the answer comes from; see ``support/answer_losses.py``.  It takes gradients, but trains nothing.

**Approximate**, without training.  What a fixed mask cannot know is what depends on the input: a model that looks up
one token among many loses it.

Zhang et al., DAM: Dynamic Attention Mask for Long-Context Large Language Model Inference Acceleration, Findings of
ACL 2025, arXiv 2506.11104.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.match import arguments, xf
from xformopt.passes.sparsify.support.answer_losses import collect_losses
from xformopt.passes.sparsify.support.attention_maps import BlockMap, collect_maps
from xformopt.passes.sparsify.support.candidates import (
    bias_refusal,
    find_attentions,
    longest_of,
    masked_attention,
    refusal,
)
from xformopt.passes.sparsify.support.static_masks import amplified, extend_mask, select_blocks
from xformopt.pipeline import Context, Effect, PassResult, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["MaskAttention"]


@dataclass(frozen=True)
class MaskAttention(RewritePass):
    """Give each head a fixed mask, and compute only the blocks it keeps.

    Attributes:
        keep: Share of the visible pairs of queries and keys that stay, up to the capture length.
        block: Tokens of a block.
        capture: How many tokens of a calibration sequence are looked at; None: all.
        power: Exponent of the Box-Cox transformation of amplified maps; 1: none, 0: logarithm.
        match: Share of a diagonal or column that a mask must keep, for it to go on behind the capture length.
        score: What blocks are ranked by: the paper's amplified maps, the attention they hold, or what the answer loses.

    """

    keep: float = 0.25
    block: int = 32
    capture: int | None = None
    power: float = 0.5
    match: float = 0.5
    score: Literal["amplified", "mass", "answer"] = "answer"

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
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
            masks = self._masks(program, maps, self._scores(program, maps, context))

        def mask_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in every:
                return None
            reason = refused[node.name]
            return (
                Reject(reason) if reason is not None else masked_attention(editor, node, masks[node.name], self.block)
            )

        return (mask_attention,)

    def _scores(self, program: Program, maps: dict[str, BlockMap], context: Context) -> dict[str, torch.Tensor]:
        if self.score == "amplified":
            return {name: amplified(found, self.power) for name, found in maps.items()}
        if self.score == "mass":
            return {name: found.mass for name, found in maps.items()}
        return collect_losses(
            program,
            context.calibration,
            maps,
            block=self.block,
            capture=self.capture,
            seed=context.seed,
            progress=context.progress,
        )

    def _masks(
        self, program: Program, maps: dict[str, BlockMap], scores: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        named = {node.name: node for node in program.nodes()}
        masks = {}
        for name, mask in select_blocks(maps, scores, self.keep).items():
            longest = longest_of(program, named[name])
            assert longest is not None
            masks[name] = extend_mask(mask, -(-longest // self.block), self.match, causal=maps[name].causal)
        return masks


def _refusal(program: Program, node: fx.Node) -> str | None:
    reason = refusal(program, node) or bias_refusal(program, node)
    if reason is None and longest_of(program, node) is None:
        return "nothing bounds its length, and a fixed mask ends somewhere: capture the model with a longest input"
    return reason


def _is_sparse(node: fx.Node) -> bool:
    return node.target == xf.block_sparse_attention


def _share_of(program: Program, node: fx.Node) -> tuple[int, int]:
    """Return how many blocks an attention keeps, and how many it would see."""
    given = arguments(node)
    mask = program.parameters[str(given["block_mask"].target)]
    every = torch.ones_like(mask)
    return int(mask.sum()), int((every.tril() if given["causal"] else every).sum())
