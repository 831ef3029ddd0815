"""Merge similar tokens between attention and MLP, layer after layer (ToMe).

    A, B = tokens behind the prefix in turn;  b(a) = argmax over B of cosine(k_a, k_b), keys averaged over heads
    x_b <- (s_a x_a + s_b x_b) / (s_a + s_b) for the r most similar pairs
    softmax(q k^T / sqrt(d) + log s) v in the layers behind

The class token, and a distillation token beside it, are never merged.  Outputs that have a value for every token get
that of the token it was merged into (unmerge).  Padding has the size 0: it is merged first, and changes nothing it
joins.

**Approximate**, without training.  Which tokens merge depends on the input; how many is fixed, so that every target
runs it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, xf
from xformopt.passes.tokens.support.token_flow import Flow, Reducer
from xformopt.passes.tokens.support.token_reduction import TokenReduction
from xformopt.passes.tokens.support.token_stream import TokenLayer, TokenStream
from xformopt.passes.tokenwise import RefusalError
from xformopt.pipeline import Context
from xformopt.program import Program, shape_of

__all__ = ["MergeTokens"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeTokens(TokenReduction):
    """Merge the most similar tokens behind each layer of attention.

    Attributes:
        r: Tokens merged away behind each layer; None: as many as fewer_flops needs.
        fewer_flops: Share of the program's floating-point operations to save, at its example sizes.
        layers: Behind which layers tokens are merged, counted from 0; None: all.
        prefix: Tokens at the front that are never merged; None: class and distillation token, where they are found.
        proportional: Whether attention adds the logarithm of a token's size to its logits.

    """

    proportional: bool = True

    sources: ClassVar[tuple[str, ...]] = ("Bolya et al., Token Merging: Your ViT But Faster, arXiv 2210.09461",)

    def most(self, tokens: int) -> int:
        """Return how many find a partner."""
        return tokens // 2

    def reducer(self, program: Program, stream: TokenStream, context: Context) -> Callable[[], Reducer]:
        """Return what merges."""
        return lambda: _Merging(self.proportional)


class _Merging(Reducer):
    def __init__(self, proportional: bool) -> None:
        self.grows = proportional
        self.restored: dict[tuple[fx.Node, int], fx.Node] = {}

    def shorten(self, flow: Flow, layer: TokenLayer, r: int) -> fx.Node:
        value, keys, heads = layer.stream, *keys_of(flow, layer)
        sizes = flow.sizes if flow.steps else flow.first_sizes(value)
        padded = sizes if flow.stream.mask is not None else None
        matched = flow.call(xf.match_tokens, keys, padded, heads=heads, prefix=flow.stream.prefix, r=r)
        pairs = tuple(flow.call(operator.getitem, matched, part) for part in range(3))
        merged = flow.call(xf.merge_tokens, value, *pairs, sizes)
        tokens = flow.call(operator.getitem, merged, 0)
        flow.sizes = flow.call(operator.getitem, merged, 1)
        flow.steps.append(pairs)
        return tokens

    def read_all(self, flow: Flow, node: fx.Node, value: fx.Node, depth: int) -> fx.Node:
        """Give every token the value of the one it was merged into, last merge first."""
        if (value, depth) not in self.restored:
            whole = value
            for pairs in reversed(flow.steps[:depth]):
                whole = flow.call(xf.restore_tokens, whole, *pairs)
            self.restored[value, depth] = whole
        return self.restored[value, depth]


def keys_of(flow: Flow, layer: TokenLayer) -> tuple[fx.Node, int]:
    """Return the keys of all attentions of a layer side by side, and how many heads they have together."""
    given = [arguments(node) for node in layer.attentions]
    widths = {shape_of(flow.program, each["k"])[2] // each["kv_heads"] for each in given}
    if len(widths) > 1:
        raise RefusalError(layer.attentions[0], "attentions side by side have heads of several widths")
    keys = [each["k"] for each in given]
    joined = keys[0] if len(keys) == 1 else flow.call(aten.cat.default, keys, 2)
    return joined, sum(each["kv_heads"] for each in given)
