"""iTransformer: attention between variables, each of which is one token.

Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting", arXiv 2310.06625: a linear
layer embeds the whole history of a variable, a post-norm encoder mixes the variables, a linear layer gives the whole
horizon; every series is normalized by its own mean and deviation first, and back at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Mlp, PostNormBlock, draw_weights
from xformopt.models.examples import example_noise
from xformopt.models.patchtst import standardize

__all__ = ["ARCHITECTURES", "ITransformer", "ITransformerConfig"]


@dataclass(frozen=True)
class ITransformerConfig:
    """An iTransformer.

    Attributes:
        length: Time steps seen.
        horizon: Time steps forecast.
        variables: Series that run side by side.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        hidden: Hidden width of the MLP.

    """

    length: int = 96
    horizon: int = 24
    variables: int = 7
    width: int = 128
    depth: int = 3
    heads: int = 8
    hidden: int = 256


class ITransformer(nn.Module):
    """Forecaster: ``series`` ``[B, T, V]`` to ``forecast`` ``[B, horizon, V]``."""

    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.length, config.width)
        self.blocks = nn.Sequential(
            *(
                PostNormBlock(config.width, Attention(config.width, config.heads), Mlp(config.width, config.hidden))
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.horizon)
        draw_weights(self)

    def forward(self, series: Tensor) -> dict[str, Tensor]:
        """Return ``{"forecast": [B, horizon, V]}``."""
        series, mean, deviation = standardize(series)
        x = self.embedding(series.transpose(1, 2))  # [B, V, C]
        forecast = self.head(self.norm(self.blocks(x))).transpose(1, 2)  # [B, horizon, V]
        return {"forecast": forecast * deviation + mean}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two noisy histories."""
        return {"series": example_noise(2, self.config.length, self.config.variables)}


ARCHITECTURES = (
    Architecture(
        "itransformer",
        lambda: ITransformer(ITransformerConfig()),
        ("Liu et al. 2023, iTransformer: Inverted Transformers Are Effective for Forecasting, arXiv 2310.06625",),
        "iTransformer, 24 steps ahead from 96, 0.4 M parameters",
    ),
)
