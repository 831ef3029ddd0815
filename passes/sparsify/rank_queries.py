"""Let only the queries attend that are farthest from uniform, and give all others the mean (Informer's ProbSparse).

    M_i = max_j s_ij - mean_j s_ij over a sample of keys, s = scale q k^T
    the factor ln T queries with the largest M:   softmax(s_i) v        all others:   the mean of v

Which queries attend depends on the input; how many is fixed by its length, so that every target runs it.  The paper
draws keys for each query anew at each call; here one sample is drawn for each attention when the pass runs, and serves
all of its queries.

Where queries see no later keys, the others get the mean up to their own position, but which queries attend is found by
comparing all of them: what a token gets depends on later ones.  A model that predicts them would be judged on what it
should not know, so that such attention is left alone unless ``causal`` is set.

**Approximate**.  Informer is trained with it, and between its layers halves the sequence by convolutions and pooling,
which is ``distill-tokens`` here.  In a model trained with full attention, this is the control.

Zhou et al., Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting, AAAI 2021,
arXiv 2012.07436.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.kernels.prob_sparse_attention import active_queries
from xformopt.match import arguments, xf
from xformopt.passes.sparsify.support.candidates import (
    bias_refusal,
    find_attentions,
    longest_of,
    refusal,
    repeat_heads,
)
from xformopt.pipeline import Context, Effect, RewritePass
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["RankQueries"]


@dataclass(frozen=True)
class RankQueries(RewritePass):
    """Let only the queries attend that are farthest from uniform.

    Attributes:
        factor: Queries that attend, for each e-fold of the length (the paper's c).
        keep: Share of the queries that attend, at the longest input; the factor follows from it where it is given.
        samples: Keys that queries are rated on; the paper takes as many as there are queries that attend.
        causal: Whether attention takes part in which queries see no later keys.

    """

    factor: float = 5.0
    keep: float | None = None
    samples: int = 32
    causal: bool = False

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Zhou et al., Informer, AAAI 2021, arXiv 2012.07436",)

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, but is {self.factor}")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, but is {self.keep}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, but is {self.samples}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the attention."""
        places = {name: number for number, name in enumerate(find_attentions(program))}

        def rank_queries(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in places:
                return None
            reason = refusal(editor.program, node) or bias_refusal(editor.program, node) or self._refusal(editor, node)
            if reason is not None:
                return Reject(reason)
            generator = torch.Generator().manual_seed(context.seed + places[node.name])
            return self._ranked(editor, node, torch.rand(self.samples, generator=generator))

        return (rank_queries,)

    def _refusal(self, editor: Editor, node: fx.Node) -> str | None:
        if arguments(node)["causal"] and not self.causal:
            return "its queries see no later keys, and which of them attend would depend on later ones"
        longest = longest_of(editor.program, node)
        if longest is None:
            return None if self.keep is None else "nothing bounds its length, of which keep is a share"
        if self.samples > longest:
            return f"its {longest} keys are fewer than samples={self.samples}, on which queries are rated"
        active = active_queries(longest, self._factor(longest))
        if active == longest:
            return f"all {longest} queries would attend"
        return None

    def _factor(self, longest: int | None) -> float:
        if self.keep is None or longest is None:
            return self.factor
        # half a query below what is wanted: the operator rounds up
        return (max(round(self.keep * longest), 1) - 0.5) / math.log(longest)

    def _ranked(self, editor: Editor, node: fx.Node, sample: torch.Tensor) -> fx.Node:
        given = arguments(node)
        return editor.call(
            xf.prob_sparse_attention,
            given["q"],
            repeat_heads(editor, given["k"], given["kv_heads"], given["heads"]),
            repeat_heads(editor, given["v"], given["kv_heads"], given["heads"]),
            editor.parameter(f"{path_of(node) or node.name}.sample", sample),
            given["key_mask"],
            given["bias"],
            heads=given["heads"],
            scale=given["scale"],
            factor=self._factor(longest_of(editor.program, node)),
            causal=given["causal"],
        )
