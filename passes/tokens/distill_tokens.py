"""Halve the sequence between layers by a convolution and max-pooling (Informer's self-attention distilling).

    X' = MaxPool(ELU(Conv(X))),   over three neighbours as a ring, and over three with stride 2: T becomes T / 2

Neighbours are what is pooled, so that it is for sequences in which they are alike, such as series of measurements.  The
paper halves behind a whole layer; here it is behind the layer's attention, where the state is one value, and the MLP
works on half of the tokens, too.  Batch norm is part of the convolution, as it is once a model is trained.

**Approximate**.  Informer is trained with it.  A model that was trained without has no such convolution: here it starts
as the identity, so that later layers get the maximum of neighbours, negative values bent by ELU.  That is the control,
and a start for ``recover-accuracy``, which trains the convolution with all else.  Outputs that have a value for every
token are refused; a mean over tokens becomes one over those that are left.

Zhou et al., Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting, AAAI 2021,
arXiv 2012.07436, equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import is_call
from xformopt.passes.tokens.support.token_flow import Flow, Reducer
from xformopt.passes.tokens.support.token_reduction import Plan, TokenReduction
from xformopt.passes.tokens.support.token_scores import Dropping
from xformopt.passes.tokens.support.token_stream import TokenLayer, TokenStream
from xformopt.passes.tokenwise import RefusalError, place_of
from xformopt.pipeline import Context
from xformopt.program import Program, value_of

__all__ = ["DistillTokens"]

aten = torch.ops.aten
_KERNEL = 3


@dataclass(frozen=True)
class DistillTokens(TokenReduction):
    """Halve the sequence behind chosen layers by convolution and max-pooling.

    Attributes:
        r: None: half of the tokens leave.
        fewer_flops: Share of the program's floating-point operations to save, at its example sizes: by as few halvings
            as it takes, evenly spread, where layers are not named.
        layers: Behind which layers the sequence is halved, counted from 0; None: as fewer_flops needs.
        prefix: Tokens at the front that stay alone; None: class and distillation token, where they are found.

    """

    sources: ClassVar[tuple[str, ...]] = ("Zhou et al., Informer, AAAI 2021, arXiv 2012.07436, equation 5",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            raise ValueError(f"half of the tokens leave, so that r cannot be {self.r}: name layers or fewer_flops")

    def most(self, tokens: int) -> int:
        """Return half, rounded down."""
        return tokens // 2

    def reducer(self, program: Program, stream: TokenStream, context: Context) -> Callable[[], Reducer]:
        """Return what halves."""
        first = stream.layers[0].stream
        if any(is_call(node, aten.max_pool1d.default) for node in program.nodes()):
            raise RefusalError(first, "its tokens are pooled already")
        if stream.mask is not None:
            raise RefusalError(first, "it has padding, which neighbours would be mixed with")
        if not isinstance(stream.length, int):
            raise RefusalError(first, f"its length varies ({stream.length}); capture the model at a fixed one")
        return _Distilling

    def _plan(self, program: Program, stream: TokenStream, build: Callable[[Plan], Program], context: Context) -> Plan:
        tokens = self._shortest(program, stream)
        if self.layers is not None:
            return _halvings(self._chosen(stream), tokens)
        count = len(stream.layers)

        def spread(halvings: int) -> Plan:
            return _halvings(sorted({place * count // (halvings + 1) for place in range(1, halvings + 1)}), tokens)

        return self._solve(program, build, count, spread, context)


def _halvings(layers: Sequence[int], tokens: int) -> Plan:
    plan: Plan = {}
    for index in layers:
        if tokens < 2:
            raise PassError(
                f"Behind layer {index} there is nothing to halve: {tokens} token is left there. Name fewer layers."
            )
        plan[index] = tokens // 2
        tokens -= plan[index]
    return plan


class _Distilling(Dropping):
    def shorten(self, flow: Flow, layer: TokenLayer, r: int) -> fx.Node:
        x, prefix = layer.stream, flow.stream.prefix
        width, name = int(value_of(x).shape[2]), f"{place_of(x) or x.name}.distilling"
        identity = torch.zeros(width, width, _KERNEL)
        identity[:, :, _KERNEL // 2] = torch.eye(width)
        weight = flow.editor.parameter(f"{name}.weight", identity.to(value_of(x).dtype))
        bias = flow.editor.parameter(f"{name}.bias", torch.zeros(width, dtype=value_of(x).dtype))
        end = int(value_of(x).shape[1])
        rest = flow.call(aten.slice.Tensor, x, 1, prefix, end) if prefix else x
        rows = flow.call(aten.transpose.int, rest, 1, 2)  # [B, C, T]
        last, first = (flow.call(aten.slice.Tensor, rows, 2, at, at + 1) for at in (end - prefix - 1, 0))
        ring = flow.call(aten.cat.default, [last, rows, first], 2)
        mixed = flow.call(aten.convolution.default, ring, weight, bias, [1], [0], [1], False, [0], 1)
        pooled = flow.call(aten.max_pool1d.default, flow.call(aten.elu.default, mixed), [_KERNEL], [2], [_KERNEL // 2])
        half = flow.call(aten.transpose.int, pooled, 1, 2)
        flow.steps.append(half)
        return flow.call(aten.cat.default, [flow.call(aten.slice.Tensor, x, 1, 0, prefix), half], 1) if prefix else half
