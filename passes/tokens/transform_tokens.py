"""Mix tokens into fewer ones, many to many, at a few layers (Token Transforming).

    X' = W X,  W of shape m x n with rows that sum to 1

The framework, which holds pruning and merging as special cases, is the paper's; W here is our construction: the m
tokens that get the most attention are anchors, S = cosine(keys of anchor, keys of token), and W = softmax of S /
temperature over the tokens that have the anchor among their nearest, weighted by size.  Sizes become ``share s``,
with ``share`` the W of columns that sum to 1; log s enters attention as in ToMe.  Outputs that have a value for every
token get ``share^T X'``.

**Approximate**, without training.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import xf
from xformopt.passes.tokens.merge_tokens import keys_of
from xformopt.passes.tokens.support.token_flow import Flow, Reducer
from xformopt.passes.tokens.support.token_reduction import TokenReduction
from xformopt.passes.tokens.support.token_scores import attention_scores
from xformopt.passes.tokens.support.token_stream import TokenLayer, TokenStream
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["TransformTokens"]

aten = torch.ops.aten


@dataclass(frozen=True)
class TransformTokens(TokenReduction):
    """Mix tokens into fewer ones behind a few layers of attention.

    Attributes:
        r: Tokens fewer behind each of the layers; None: as many as fewer_flops needs.
        fewer_flops: Share of the program's floating-point operations to save, at its example sizes.
        layers: Behind which layers, counted from 0; None: points of them, evenly spread from the front.
        prefix: Tokens at the front that stay alone; None: class and distillation token, where they are found.
        points: Behind how many layers, where layers does not name them.
        neighbours: In how many anchors a token takes part.
        temperature: Of the softmax over similarities.

    """

    points: int = 3
    neighbours: int = 2
    temperature: float = 0.1

    sources: ClassVar[tuple[str, ...]] = ("Zeng et al., Token Transforming, arXiv 2506.05709 (W is ours)",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 1 or self.neighbours < 1:
            raise ValueError(f"points and neighbours must be at least 1, but are {self.points} and {self.neighbours}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, but is {self.temperature}")

    def most(self, tokens: int) -> int:
        """Return all but one."""
        return max(tokens - 1, 0)

    def default_layers(self, count: int) -> list[int]:
        """Return the compression points: the first at a quarter of the depth or before, none at the last layer."""
        points = min(self.points, count)
        return sorted({place * count // (points + 1) for place in range(1, points + 1)})

    def reducer(self, program: Program, stream: TokenStream, context: Context) -> Callable[[], Reducer]:
        """Return what mixes."""
        if stream.mask is not None:
            raise PassError(
                f"{program.name} has padding, which may become an anchor when more tokens are to stay than there are; "
                f"transform-tokens takes sequences without. Use merge-tokens."
            )
        return lambda: _Mixing(self.neighbours, self.temperature)


class _Mixing(Reducer):
    grows = True

    def __init__(self, neighbours: int, temperature: float) -> None:
        self.neighbours, self.temperature = neighbours, temperature

    def shorten(self, flow: Flow, layer: TokenLayer, r: int) -> fx.Node:
        keys, _ = keys_of(flow, layer)
        scores = attention_scores(flow, layer, "all")
        options = {"prefix": flow.stream.prefix, "neighbours": self.neighbours, "temperature": self.temperature, "r": r}
        both = flow.call(xf.transform_tokens, keys, scores, flow.sizes, **options)
        mix, share = (flow.call(operator.getitem, both, part) for part in (0, 1))
        if flow.sizes is None:
            flow.sizes = flow.call(aten.sum.dim_IntList, share, [2])
        else:
            column = flow.call(aten.bmm.default, share, flow.call(aten.unsqueeze.default, flow.sizes, 2))
            flow.sizes = flow.call(aten.squeeze.dim, column, 2)
        flow.steps.append(share)
        return flow.call(aten.bmm.default, mix, layer.stream)

    def read_all(self, flow: Flow, node: fx.Node, value: fx.Node, depth: int) -> fx.Node:
        """Give every token the mean of those it was mixed into, by its share in each."""
        for share in reversed(flow.steps[:depth]):
            value = flow.call(aten.bmm.default, flow.call(aten.transpose.int, share, 1, 2), value)
        return value
