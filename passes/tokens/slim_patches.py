"""Let patches leave one after another, by a life predicted once, early (patch slimming by life regression).

The paper trains a small head that regresses for every token the layer after which it is of no use, its *life*, end to
end with the model.  **Substitute**, training-free: the head is a linear regression (ridge) on the early layer's
tokens, fitted in closed form on calibration data; its target is the last layer in which the token gets more attention
than the quantile of all tokens there.  Deployment differs too: tokens are sorted by their life once and every layer
keeps a fixed number from the front, so that shapes do not depend on the image.

    life(x) = w . x + c;   order = sort by falling life, once behind the first of the layers;   later layers: a prefix

**Approximate**; needs calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.kernels.attention_received import attention_received
from xformopt.match import arguments, xf
from xformopt.passes.tokens.support.token_flow import Flow, Reducer
from xformopt.passes.tokens.support.token_reduction import TokenReduction
from xformopt.passes.tokens.support.token_scores import Dropping
from xformopt.passes.tokens.support.token_stream import TokenLayer, TokenStream
from xformopt.passes.tokenwise import RefusalError
from xformopt.pipeline import Context
from xformopt.program import Program, interpret, value_of

__all__ = ["SlimPatches"]

aten = torch.ops.aten

# ridge, as a share of the mean of the squared features
_RIDGE = 1e-3


@dataclass(frozen=True)
class SlimPatches(TokenReduction):
    """Sort patches by a predicted life behind an early layer, and keep fewer of them layer after layer.

    Attributes:
        r: Tokens that leave behind each layer; None: as many as fewer_flops needs.
        fewer_flops: Share of the program's floating-point operations to save, at its example sizes.
        layers: Behind which layers, counted from 0; life is predicted at the first of them; None: all but the first.
        prefix: Tokens at the front that stay; None: class and distillation token, where they are found.
        quantile: A token is alive in a layer where it gets more attention than this share of the tokens.

    """

    quantile: float = 0.5

    sources: ClassVar[tuple[str, ...]] = (
        "Chen et al., arXiv 2304.04926 (life regression; fitted in closed form here, not trained)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, but is {self.quantile}")

    def most(self, tokens: int) -> int:
        """Return all but one."""
        return max(tokens - 1, 0)

    def default_layers(self, count: int) -> list[int]:
        """Return all layers but the first, whose tokens say little as yet."""
        return list(range(min(1, count - 1), count))

    def reducer(self, program: Program, stream: TokenStream, context: Context) -> Callable[[], Reducer]:
        """Fit the regression; return what sorts and cuts."""
        if stream.mask is not None:
            raise RefusalError(stream.mask, "its sequences have padding, and life is for the patches of an image")
        if not context.calibration:
            raise DataError(
                "The life of patches is fitted on calibration data, and there is none. Give some with --calibration "
                "(or calibration=... in Python)."
            )
        first = min(self.layers) if self.layers else self.default_layers(len(stream.layers))[0]
        if not 0 <= first < len(stream.layers):
            return lambda: _Slimming(torch.zeros(0), torch.zeros(0))
        weight, bias = _fit(program, stream, first, self.quantile, context.calibration)
        return lambda: _Slimming(weight, bias)


class _Slimming(Dropping):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias

    def shorten(self, flow: Flow, layer: TokenLayer, r: int) -> fx.Node:
        if flow.steps:
            # sorted before: what lives longest stands in front
            length = layer.stream.meta["val"].shape[1]
            flow.steps.append(r)
            return flow.call(aten.slice.Tensor, layer.stream, 1, 0, length - r)
        weight = flow.editor.parameter("life.weight", self.weight)
        bias = flow.editor.parameter("life.bias", self.bias)
        lives = flow.call(aten.squeeze.dim, flow.call(xf.linear, layer.stream, weight, bias), 2)
        return self.drop(flow, layer.stream, flow.call(xf.rank_tokens, lives, prefix=flow.stream.prefix, r=r))


@dataclass
class _Observed:
    """What one batch shows: the early tokens, and in how many layers each was alive last."""

    program: Program
    stream: TokenStream
    first: int
    quantile: float
    tokens: torch.Tensor | None = None
    lives: torch.Tensor | None = None
    operands: dict[str, torch.Tensor] = field(default_factory=dict)

    def observe(self, node: fx.Node, value: Any) -> None:
        """Take one value of the program as it is computed."""
        if node is self.stream.layers[self.first].stream:
            self.tokens = value[:, self.stream.prefix :]
        for index, layer in enumerate(self.stream.layers):
            for attention in layer.attentions:
                given = arguments(attention)
                if node in (given["q"], given["k"]):
                    self.operands[node.name] = value
                if node is attention and index > self.first:
                    self._mark(index, given)

    def _mark(self, index: int, given: Mapping[str, Any]) -> None:
        q, k = (self.operands[given[name].name] for name in ("q", "k"))
        heads = {name: given[name] for name in ("heads", "kv_heads", "scale")}
        scores = attention_received(q, k, **heads)[:, self.stream.prefix :]  # [B, T]
        alive = scores > scores.quantile(self.quantile, 1, keepdim=True)
        lives = torch.zeros_like(scores) if self.lives is None else self.lives
        self.lives = torch.where(alive, torch.full_like(lives, index - self.first), lives)


def _fit(
    program: Program,
    stream: TokenStream,
    first: int,
    quantile: float,
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight ``[1, C]`` and bias ``[1]`` of the ridge regression of lives on early tokens."""
    features, lives = [], []
    dtype = value_of(stream.layers[first].stream).dtype
    for batch in batches:
        seen = _Observed(program, stream, first, quantile)
        interpret(program, batch, observe=seen.observe)
        assert seen.tokens is not None
        alive = seen.lives if seen.lives is not None else seen.tokens.new_zeros(seen.tokens.shape[:2])
        features.append(seen.tokens.flatten(0, 1).double())
        lives.append(alive.flatten().double())
    x, y = torch.cat(features), torch.cat(lives)
    mean, target = x.mean(0), y.mean()
    centred = x - mean
    gram = centred.t() @ centred
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + ridge, centred.t() @ (y - target))
    return weight.unsqueeze(0).to(dtype), (target - mean @ weight).reshape(1).to(dtype)
