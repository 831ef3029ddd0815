"""Conformer: speech recognition by convolution and attention, over a whole recording or chunk by chunk.

Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", arXiv 2005.08100: two strided
convolutions, then blocks of half an MLP, self-attention with relative sinusoidal positions (Dai et al., Transformer-XL,
arXiv 1901.02860), a convolution module and half an MLP.  To be able to stream, all convolutions look back only, and a
frame attends inside its own chunk and to ``memory`` frames before it (Chen et al., arXiv 2010.11395): ``stream``
computes exactly what ``forward`` does, one chunk at a time, from a state that it takes and returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Mlp, draw_weights, merge_heads, sinusoids, split_heads
from xformopt.models.examples import example_noise

__all__ = ["ARCHITECTURES", "Conformer", "ConformerConfig"]

_SHRINK = 4
# frames that a convolution of kernel 3 looks back on
_BACK = 2


@dataclass(frozen=True)
class ConformerConfig:
    """A Conformer.

    Attributes:
        features: Filter-bank energies of an input frame, a multiple of 4.
        frames: Input frames of the example, a multiple of ``4 * chunk``.
        vocabulary: Outputs of each frame.
        width: Channels.
        depth: Blocks.
        heads: Attention heads.
        kernel: Frames that the depthwise convolution sees.
        chunk: Frames, after the fourfold shrinking, that are processed together.
        memory: Frames before the chunk that attention sees, a multiple of ``chunk``.

    """

    features: int = 40
    frames: int = 128
    vocabulary: int = 32
    width: int = 96
    depth: int = 3
    heads: int = 4
    kernel: int = 15
    chunk: int = 8
    memory: int = 16


def look_back(x: Tensor, past: Tensor | None, frames: int, axis: int) -> Tensor:
    """Put ``past``, or that many frames of silence, in front of ``x``."""
    if past is None:
        shape = list(x.shape)
        shape[axis] = frames
        past = x.new_zeros(shape)
    return torch.cat([past, x], axis)


class Shrinking(nn.Module):
    """Two 3 x 3 convolutions of stride 2 over time and frequency, and a linear layer: four frames become one."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, stride=2, padding=(0, 1))
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=(0, 1))
        self.projection = nn.Linear(width * (features // _SHRINK), width)

    def forward(self, features: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``[B, T, F]`` to ``[B, T / 4, C]``, and the last frames each convolution has seen."""
        x = look_back(features.unsqueeze(1), past[0] if past else None, _BACK, 2)  # [B, 1, 2 + T, F]
        y = look_back(functional.relu(self.first(x)), past[1] if past else None, _BACK, 2)
        z = functional.relu(self.second(y))  # [B, C, T / 4, F / 4]
        return self.projection(z.transpose(1, 2).flatten(2)), (x[:, :, -_BACK:], y[:, :, -_BACK:])


class RelativeAttention(nn.Module):
    """Logits ``(q + u) k^T + (q + v) r^T``, with r a projection of the sinusoid of the distance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.distance = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.randn(width) * 0.02)
        self.distance_bias = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Mix ``context`` ``[B, S, C]``, which ends with ``x`` ``[B, T, C]``, where ``mask`` ``[T, S]`` is True."""
        q = self.query(x)
        k, v = (split_heads(linear(context), self.heads) for linear in (self.key, self.value))  # [B, H, S, D]
        by_distance = self._by_distance(split_heads(q + self.distance_bias, self.heads), context.shape[1])
        bias = (by_distance * self.scale).masked_fill(~mask, -1e9)  # [B, H, T, S]
        content = split_heads(q + self.content_bias, self.heads)
        x = functional.scaled_dot_product_attention(content, k, v, attn_mask=bias, scale=self.scale)
        x = self.output(merge_heads(x))
        return x

    def _by_distance(self, q: Tensor, keys: int) -> Tensor:
        """Return ``q r^T`` for each key's distance, ``[B, H, T, S]``; the last query stands on the last key."""
        queries = q.shape[2]
        # every distance there is: from the last query to the first key, down to the first query and the last key
        distances = torch.arange(keys - 1, -queries, -1, device=q.device)
        r = self.distance(sinusoids(distances, self.distance.in_features))[None]  # [1, R, C]
        scores = q @ split_heads(r, self.heads).transpose(-1, -2)  # [B, H, T, R]
        places = torch.arange(queries - 1, -1, -1, device=q.device)[:, None] + torch.arange(keys, device=q.device)
        return scores.gather(-1, places.expand(*q.shape[:2], -1, -1))


class ConvolutionModule(nn.Module):
    """Gated pointwise layer, depthwise convolution that looks back, batch norm, swish, pointwise layer."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.back = kernel - 1
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.narrow = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[B, T, C]`` to the same shape, and the last frames the convolution has seen."""
        value, gate = self.widen(self.norm(x)).chunk(2, -1)
        seen = look_back(value * gate.sigmoid(), past, self.back, 1)  # [B, kernel - 1 + T, C]
        x = functional.silu(self.batch_norm(self.depthwise(seen.transpose(1, 2))))
        return self.narrow(x.transpose(1, 2)), seen[:, -self.back :]


class ConformerBlock(nn.Module):
    """Half an MLP, attention, convolution, half an MLP, norm."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        width = config.width
        self.first, self.last = (nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width, nn.SiLU)) for _ in range(2))
        self.attention_norm, self.attention = nn.LayerNorm(width), RelativeAttention(width, config.heads)
        self.convolution = ConvolutionModule(width, config.kernel)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, mask: Tensor, past: Tensor | None, convolved: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``[B, T, C]``, the attention's context ``[B, S, C]``, and the convolution's last frames."""
        x = x + 0.5 * self.first(x)
        normed = self.attention_norm(x)
        context = normed if past is None else torch.cat([past, normed], 1)
        x = x + self.attention(normed, context, mask)
        mixed, convolved = self.convolution(x, convolved)
        x = x + mixed
        return self.norm(x + 0.5 * self.last(x)), context, convolved


class Conformer(nn.Module):
    """Recognizer: ``features`` ``[B, T, F]`` to ``logits`` ``[B, T / 4, V]``, one distribution for each frame."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.shrinking = Shrinking(config.features, config.width)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocabulary)
        draw_weights(self)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, T / 4, V]}`` of a whole recording."""
        x, _ = self.shrinking(features, None)
        frames = torch.arange(x.shape[1], device=x.device)
        start = frames[:, None] // self.config.chunk * self.config.chunk  # first frame of each query's chunk
        mask = (frames >= start - self.config.memory) & (frames < start + self.config.chunk)  # [T, T]
        for block in self.blocks:
            x, _, _ = block(x, mask, None, None)
        return {"logits": self.head(x)}

    def stream(self, features: Tensor, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the logits of the next chunk ``[B, 4 * chunk, F]``, and the state after it."""
        x, (frames, maps) = self.shrinking(features, (state["frames"], state["maps"]))
        memory, chunk = self.config.memory, self.config.chunk
        # at the start of a recording only the end of the memory holds anything
        known = torch.arange(memory + chunk, device=x.device) >= memory - state["seen"]
        mask = known.expand(chunk, -1)  # [T, S]
        contexts, convolutions = [], []
        for index, block in enumerate(self.blocks):
            x, context, convolved = block(x, mask, state["contexts"][index], state["convolutions"][index])
            contexts.append(context[:, -memory:])
            convolutions.append(convolved)
        after = {
            "frames": frames,
            "maps": maps,
            "contexts": torch.stack(contexts),
            "convolutions": torch.stack(convolutions),
            "seen": state["seen"] + chunk,
        }
        return {"logits": self.head(x)}, after

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """Return the state before the first chunk: what each layer remembers, and how many frames it has seen."""
        config = self.config
        sizes = {
            "frames": (batch, 1, _BACK, config.features),
            "maps": (batch, config.width, _BACK, math.ceil(config.features / 2)),
            "contexts": (config.depth, batch, config.memory, config.width),
            "convolutions": (config.depth, batch, config.kernel - 1, config.width),
        }
        return {name: torch.zeros(size) for name, size in sizes.items()} | {"seen": torch.tensor(0)}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two noisy recordings."""
        return {"features": example_noise(2, self.config.frames, self.config.features)}


ARCHITECTURES = (
    Architecture(
        "conformer-micro",
        lambda: Conformer(ConformerConfig()),
        (
            "Gulati et al. 2020, Conformer: Convolution-augmented Transformer for Speech Recognition, arXiv 2005.08100",
            "Chen et al. 2020, Developing Real-time Streaming Transformer Transducer, arXiv 2010.11395",
        ),
        "Conformer that can stream, 0.9 M parameters",
    ),
)
