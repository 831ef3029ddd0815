"""Attend to a token's own block key by key, and to every other block through what stands for it (Combiner).

    p~_i = softmax over scale q_i k_j, j in the own block, and scale q_i k_R, R every other block
    p(j | i) = p~_i(j) in the own block,   p~_i(R) softmax_j(scale q_R k_j) for j in R

``q_R`` and ``k_R`` are the largest entries of the block's queries and keys: the pattern that the paper calls fixed,
with its pooling.  Every query has some weight on every key; T tokens cost what ``T (b + T / b)`` pairs do.

**Approximate**.  Combiner is trained so; in a model trained with full attention this is the control, and a start for
``recover-accuracy``.  A bias between tokens has no meaning for a block as a whole: such attention is left alone.

Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost, NeurIPS 2021, arXiv 2107.05768.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.match import arguments, xf
from xformopt.passes.sparsify.support.candidates import find_attentions, longest_of, refusal, repeat_heads
from xformopt.pipeline import Context, Effect, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["CombineRegions"]


@dataclass(frozen=True)
class CombineRegions(RewritePass):
    """Attend to the own block key by key, and to every other block through what stands for it.

    Attributes:
        block: Tokens of a block.

    """

    block: int = 32

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Ren et al., Combiner, NeurIPS 2021, arXiv 2107.05768",)

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"block must be at least 2, but is {self.block}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the attention."""
        every = set(find_attentions(program))

        def combine_regions(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in every:
                return None
            reason = refusal(editor.program, node) or self._refusal(editor.program, node)
            return Reject(reason) if reason is not None else self._combined(editor, node)

        return (combine_regions,)

    def _refusal(self, program: Program, node: fx.Node) -> str | None:
        if arguments(node)["bias"] is not None:
            return "it has a bias between tokens, which says nothing of blocks as wholes"
        longest = longest_of(program, node)
        if longest is not None and longest <= self.block:
            return f"its longest input of {longest} tokens is one block of {self.block}"
        return None

    def _combined(self, editor: Editor, node: fx.Node) -> fx.Node:
        given = arguments(node)
        return editor.call(
            xf.combiner_attention,
            given["q"],
            repeat_heads(editor, given["k"], given["kv_heads"], given["heads"]),
            repeat_heads(editor, given["v"], given["kv_heads"], given["heads"]),
            given["key_mask"],
            heads=given["heads"],
            scale=given["scale"],
            block=self.block,
            causal=given["causal"],
        )
