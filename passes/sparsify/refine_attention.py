"""Compute attention exactly in the blocks where it is largest, and by means of blocks elsewhere (MRA-2).

    L = scale Q~ K~^T of the means of blocks;   S = the largest of L in the whole matrix of a head, the diagonal first
    weights exp(scale q k^T) in the blocks of S, exp(L) for each key of all others;   one normaliser for both

Which blocks are exact depends on the input; how many is fixed by its length, so that every target runs it.  The paper
is for attention in both directions; where queries see no later keys, means stand for blocks strictly before a query's
own alone.  All blocks chosen is exact attention.

**Approximate**, without training.

Zeng et al., Multi Resolution Analysis (MRA) for Approximate Self-Attention, ICML 2022, arXiv 2207.10284.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.kernels.chunks import chunk_count
from xformopt.match import arguments, xf
from xformopt.passes.sparsify.support.candidates import (
    bias_refusal,
    find_attentions,
    longest_of,
    refusal,
    repeat_heads,
)
from xformopt.pipeline import Context, Effect, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["RefineAttention"]


@dataclass(frozen=True)
class RefineAttention(RewritePass):
    """Compute attention exactly where it is largest, and by means of blocks elsewhere.

    Attributes:
        keep: Share of the visible blocks that are exact in each head; those on the diagonal always are.
        block: Tokens of a block.
        coarse: Whether the other blocks count by their means (MRA-2) or not at all (MRA-2-s).

    """

    keep: float = 0.25
    block: int = 32
    coarse: bool = True

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Zeng et al., Multi Resolution Analysis (MRA) for Approximate Self-Attention, arXiv 2207.10284",
    )

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, but is {self.keep}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, but is {self.block}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the attention."""
        every = set(find_attentions(program))

        def refine_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in every:
                return None
            reason = refusal(editor.program, node) or bias_refusal(editor.program, node) or self._refusal(editor, node)
            return Reject(reason) if reason is not None else self._refined(editor, node)

        return (refine_attention,)

    def _refusal(self, editor: Editor, node: fx.Node) -> str | None:
        longest = longest_of(editor.program, node)
        if longest is None:
            return None
        N = chunk_count(longest, self.block)
        visible = N * (N + 1) // 2 if arguments(node)["causal"] else N * N
        if self.keep * visible < N:
            return (
                f"{self.keep:.0%} of {visible} blocks are fewer than the {N} on the diagonal, even for the longest "
                f"input of {longest} tokens: keep more, or choose smaller blocks"
            )
        return None

    def _refined(self, editor: Editor, node: fx.Node) -> fx.Node:
        given = arguments(node)
        return editor.call(
            xf.mra_attention,
            given["q"],
            repeat_heads(editor, given["k"], given["kv_heads"], given["heads"]),
            repeat_heads(editor, given["v"], given["kv_heads"], given["heads"]),
            given["key_mask"],
            given["bias"],
            heads=given["heads"],
            scale=given["scale"],
            block=self.block,
            keep=self.keep,
            causal=given["causal"],
            coarse=self.coarse,
        )
