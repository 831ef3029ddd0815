"""DeltaNet: a language model whose layers write by the delta rule (Yang et al., arXiv 2406.06484)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from xformopt.kernels.definition import xf
from xformopt.models.architecture import Architecture
from xformopt.models.sequence import CausalConvolution, FeedForward, LanguageModel, norm

__all__ = ["ARCHITECTURES", "DeltaNet", "DeltaNetConfig"]


@dataclass(frozen=True)
class DeltaNetConfig:
    """Sizes of a DeltaNet.

    Attributes:
        convolution: Tokens of the short convolutions on queries, keys and values.
        negative_eigenvalues: ``beta`` up to 2 instead of 1 (Grazzi et al., arXiv 2411.12537).

    """

    vocabulary: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 352
    convolution: int = 4
    negative_eigenvalues: bool = False


class DeltaLayer(nn.Module):
    """Section 3.3: short convolutions, queries and keys of length one, the delta rule, a norm for each head."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.depth = width // config.heads
        self.largest = 2.0 if config.negative_eigenvalues else 1.0
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.beta = nn.Linear(width, config.heads, bias=False)
        self.query_convolution = CausalConvolution(width, config.convolution)
        self.key_convolution = CausalConvolution(width, config.convolution)
        self.value_convolution = CausalConvolution(width, config.convolution)
        self.norm_weight = nn.Parameter(torch.ones(self.depth))
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        written = xf.delta_rule(
            self._unit(self.query_convolution(self.query(x))),
            self._unit(self.key_convolution(self.key(x))),
            self.value_convolution(self.value(x)),
            self.largest * torch.sigmoid(self.beta(x)),
            heads=self.heads,
            scale=self.depth**-0.5,
        )
        output: torch.Tensor = self.output(xf.rms_norm(written, self.norm_weight, eps=1e-5, groups=self.heads))
        return output

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """Bring each head to length one: to a mean square of one, then over the root of its width."""
        unit: torch.Tensor = xf.rms_norm(x, eps=1e-6, groups=self.heads) * self.depth**-0.5
        return unit


class Block(nn.Module):
    """A delta layer and SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.delta_norm = norm(config.width)
        self.delta = DeltaLayer(config)
        self.feed_forward_norm = norm(config.width)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        x = x + self.delta(self.delta_norm(x))
        y: torch.Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y


class DeltaNet(LanguageModel):
    """A DeltaNet language model."""

    def __init__(self, config: DeltaNetConfig | None = None) -> None:
        config = config or DeltaNetConfig()
        super().__init__(config.vocabulary, config.width, (Block(config) for _ in range(config.layers)))


ARCHITECTURES = (
    Architecture(
        name="deltanet-small",
        module=DeltaNet,
        sources=("Parallelizing Linear Transformers with the Delta Rule (Yang et al., arXiv 2406.06484)",),
        summary="language model with the delta rule, 4 layers of width 128",
    ),
)
