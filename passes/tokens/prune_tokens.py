"""Drop the tokens that get the least attention, between attention and MLP, layer after layer.

    score_j = mean over heads h and queries i of softmax(q_i k_j^T / sqrt(d))_h;  the r lowest leave

``by="class"`` counts the class token's query alone (EViT's score, without its token that stands for those dropped);
``by="all"`` every query (Learned Token Pruning, without its learned thresholds: the number is fixed).

**Approximate**, without training.  Outputs that have a value for every token are refused; a mean over tokens becomes
one over those that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.match import xf
from xformopt.passes.tokens.support.token_flow import Flow, Reducer
from xformopt.passes.tokens.support.token_reduction import TokenReduction
from xformopt.passes.tokens.support.token_scores import Dropping, Judge, attention_scores
from xformopt.passes.tokens.support.token_stream import TokenLayer, TokenStream
from xformopt.passes.tokenwise import RefusalError
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["PruneTokens"]


@dataclass(frozen=True)
class PruneTokens(TokenReduction):
    """Drop the tokens that get the least attention behind each layer.

    Attributes:
        r: Tokens dropped behind each layer; None: as many as fewer_flops needs.
        fewer_flops: Share of the program's floating-point operations to save, at its example sizes.
        layers: Behind which layers tokens are dropped, counted from 0; None: all.
        prefix: Tokens at the front that are never dropped; None: class and distillation token, where they are found.
        by: Whose attention counts: class (that of the tokens at the front) or all.

    """

    by: Judge = "all"

    sources: ClassVar[tuple[str, ...]] = (
        "Liang et al., EViT, arXiv 2202.07800, section 3.2 (by=class)",
        "Kim et al., Learned Token Pruning for Transformers, arXiv 2107.00910, equation 3 (by=all)",
    )

    def most(self, tokens: int) -> int:
        """Return all but one."""
        return max(tokens - 1, 0)

    def reducer(self, program: Program, stream: TokenStream, context: Context) -> Callable[[], Reducer]:
        """Return what drops."""
        if self.by == "class" and not stream.prefix:
            raise RefusalError(stream.layers[0].stream, "there is no class token whose attention counts; use by=all")
        return lambda: _Pruning(self.by)


class _Pruning(Dropping):
    def __init__(self, by: Judge) -> None:
        self.by = by

    def shorten(self, flow: Flow, layer: TokenLayer, r: int) -> fx.Node:
        scores = attention_scores(flow, layer, self.by)
        return self.drop(flow, layer.stream, flow.call(xf.rank_tokens, scores, prefix=flow.stream.prefix, r=r))
