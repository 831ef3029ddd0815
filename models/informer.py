"""Informer: long forecasts from an encoder that lets only its most telling queries attend.

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting", arXiv 2012.07436:
ProbSparse attention, convolutions that halve the sequence between encoder blocks ("distilling"), and a decoder that is
given the end of the history followed by zeros and returns the whole horizon at once.  The keys on which queries are
rated are drawn once, when the model is made, instead of at every call; calendar features are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Mlp, PostNormBlock, draw_weights, merge_heads, sinusoids, split_heads
from xformopt.models.examples import example_noise

__all__ = ["ARCHITECTURES", "Informer", "InformerConfig", "ProbSparseAttention"]


@dataclass(frozen=True)
class InformerConfig:
    """An Informer.

    Attributes:
        length: Time steps seen.
        known: Of these, the latest that the decoder is given too.
        horizon: Time steps forecast.
        variables: Series that run side by side.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Hidden width of the MLP.
        encoder_depth: Encoder blocks; between two, the sequence is halved.
        decoder_depth: Decoder blocks.
        factor: Queries that attend, and keys they are rated on, for each e-fold of the length.

    """

    length: int = 96
    known: int = 48
    horizon: int = 24
    variables: int = 7
    width: int = 96
    heads: int = 4
    hidden: int = 192
    encoder_depth: int = 2
    decoder_depth: int = 1
    factor: int = 5


class ProbSparseAttention(nn.Module):
    """Softmax attention for the ``u = factor * ln T`` queries that are farthest from uniform, the mean for others.

    A query is rated by ``max_j - mean_j`` of its logits on a sample of as many keys.  With ``causal``, the others get
    the mean of the values up to their own position, and a query sees no later key.
    """

    sample: Tensor

    def __init__(self, width: int, heads: int, length: int, factor: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.active = min(factor * math.ceil(math.log(length)), length)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.register_buffer("sample", torch.randint(length, (length, self.active)))  # keys that rate each query

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        q, k, v = (split_heads(linear(x), self.heads) for linear in (self.query, self.key, self.value))  # [B, H, T, D]
        chosen = self._rating(q, k).topk(self.active, -1).indices  # [B, H, u]
        rows = chosen[..., None].expand(-1, -1, -1, q.shape[-1])  # [B, H, u, D]
        logits = q.gather(2, rows) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, u, T]
        if self.causal:
            later = torch.arange(x.shape[1], device=x.device) > chosen[..., None]
            logits = logits.masked_fill(later, torch.finfo(logits.dtype).min)
        mixed = self._means(v).scatter(2, rows, logits.softmax(-1) @ v)
        x = self.output(merge_heads(mixed))
        return x

    def _rating(self, q: Tensor, k: Tensor) -> Tensor:
        """Return how far each query is from uniform attention, ``[B, H, T]``."""
        sampled = k[:, :, self.sample]  # [B, H, T, u, D]
        logits = (q.unsqueeze(3) * sampled).sum(-1)  # [B, H, T, u]
        return logits.amax(-1) - logits.mean(-1)

    def _means(self, v: Tensor) -> Tensor:
        """Return what queries get that do not attend, ``[B, H, T, D]``."""
        if not self.causal:
            return v.mean(2, keepdim=True).expand_as(v)
        return v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]


class Embedding(nn.Module):
    """A convolution over three neighbouring time steps, the series taken as a ring, plus sinusoidal positions."""

    positions: Tensor

    def __init__(self, variables: int, width: int, length: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(variables, width, 3, bias=False)
        self.register_buffer("positions", sinusoids(torch.arange(length), width)[None])

    def forward(self, series: Tensor) -> Tensor:
        """``[B, T, V]`` to ``[B, T, C]``."""
        return around(series, self.convolution) + self.positions


def around(x: Tensor, convolution: nn.Conv1d) -> Tensor:
    """Convolve ``[B, T, C]`` with a kernel of three as a ring."""
    ring = torch.cat([x[:, -1:], x, x[:, :1]], 1)
    x = convolution(ring.transpose(1, 2))
    return x.transpose(1, 2)


class Distilling(nn.Module):
    """Convolution, batch norm, ELU, and max-pooling to half the length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, (T + 1) / 2, C]``."""
        x = functional.elu(self.norm(around(x, self.convolution).transpose(1, 2)))
        return functional.max_pool1d(x, 3, stride=2, padding=1).transpose(1, 2)


class DecoderBlock(nn.Module):
    """Causal ProbSparse attention, full attention to the encoder's result, MLP; norms follow the residual sums."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        width, length = config.width, config.known + config.horizon
        self.mixer = ProbSparseAttention(width, config.heads, length, config.factor, causal=True)
        self.mixer_norm = nn.LayerNorm(width)
        self.rest = PostNormBlock(width, Attention(width, config.heads), Mlp(width, config.hidden))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape, with ``memory`` ``[B, S, C]``."""
        x = self.mixer_norm(x + self.mixer(x))
        x = self.rest(x, None, memory)
        return x


class Informer(nn.Module):
    """Forecaster: ``series`` ``[B, T, V]`` to ``forecast`` ``[B, horizon, V]``."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.config = config
        width, length = config.width, config.length
        self.encoder_embedding = Embedding(config.variables, width, length)
        self.decoder_embedding = Embedding(config.variables, width, config.known + config.horizon)
        encoder: list[nn.Module] = []
        for block in range(config.encoder_depth):
            if block:
                encoder.append(Distilling(width))
                length = (length + 1) // 2
            mixer = ProbSparseAttention(width, config.heads, length, config.factor)
            encoder.append(PostNormBlock(width, mixer, Mlp(width, config.hidden)))
        self.encoder = nn.Sequential(*encoder, nn.LayerNorm(width))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.variables)
        draw_weights(self)

    def forward(self, series: Tensor) -> dict[str, Tensor]:
        """Return ``{"forecast": [B, horizon, V]}``."""
        memory = self.encoder(self.encoder_embedding(series))  # [B, S, C]
        known = series[:, -self.config.known :]
        x = self.decoder_embedding(functional.pad(known, (0, 0, 0, self.config.horizon)))  # [B, known + horizon, C]
        for block in self.decoder:
            x = block(x, memory)
        return {"forecast": self.head(self.norm(x))[:, -self.config.horizon :]}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two noisy histories."""
        return {"series": example_noise(2, self.config.length, self.config.variables)}


ARCHITECTURES = (
    Architecture(
        "informer",
        lambda: Informer(InformerConfig()),
        ("Zhou et al. 2020, Informer: Beyond Efficient Transformer for Forecasting, arXiv 2012.07436",),
        "Informer, 24 steps ahead from 96, 0.3 M parameters",
    ),
)
