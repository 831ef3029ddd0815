"""DiT: a transformer as the denoiser of a diffusion model.

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748: patches of a noisy latent are tokens
with fixed sine-cosine positions; time step and class condition every block through shift, scale and gate vectors of its
two residual paths (adaLN); the last layer gives the noise, and the variance where it is learned, of each patch.
Training starts with these vectors and the last layer at zero (adaLN-Zero); here they are drawn, so that a fresh model
computes something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Grid, Mlp, PatchEmbedding, draw_weights, sinusoids
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Dit", "DitConfig"]

_TIME_WIDTH = 256


@dataclass(frozen=True)
class DitConfig:
    """A DiT.

    Attributes:
        image_size: Side of the latent.
        in_channels: Its channels.
        patch: Side of a patch.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        classes: Classes; one more stands for none (classifier-free guidance).
        learned_variance: Whether the output has a variance beside the noise.

    """

    image_size: int = 16
    in_channels: int = 4
    patch: int = 2
    width: int = 96
    depth: int = 3
    heads: int = 4
    classes: int = 10
    learned_variance: bool = True

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (1 + self.learned_variance)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift the channels of ``[B, T, C]`` by ``[B, C]``."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Modulation(nn.Sequential):
    """``[B, C]`` to ``parts`` vectors ``[B, C]`` in one."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))


class DitBlock(nn.Module):
    """Attention and MLP, modulated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width, lambda: nn.GELU(approximate="tanh"))
        self.modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape, under ``condition`` ``[B, C]``."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, -1)
        x = x + gate.unsqueeze(1) * self.attention(modulate(self.attention_norm(x), shift, scale))
        x = x + mlp_gate.unsqueeze(1) * self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale))
        return x


def grid_positions(grid: Grid, width: int) -> Tensor:
    """Return ``[1, H * W, width]``: half of the channels tell the row, half the column."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))  # [H * W, 2]
    return sinusoids(places, width // 2).flatten(1)[None]


class Dit(nn.Module):
    """Denoiser: ``latent`` ``[B, C, H, W]``, ``timestep`` ``[B]`` and ``label`` ``[B]`` to ``noise``.

    ``noise`` is ``[B, out_channels, H, W]``: the noise, then what tells its variance where that is learned.
    """

    positions: Tensor

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.patch
        self.embedding = PatchEmbedding(config.in_channels, width, config.patch)
        self.register_buffer("positions", grid_positions((side, side), width))
        self.time = nn.Sequential(nn.Linear(_TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(config.classes + 1, width)
        self.blocks = nn.ModuleList(DitBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, 2)
        self.head = nn.Linear(width, config.out_channels * config.patch**2)
        draw_weights(self)

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return ``{"noise": [B, out_channels, H, W]}``."""
        condition = self.time(sinusoids(timestep, _TIME_WIDTH)) + self.labels(label)  # [B, C]
        x = self.embedding(latent) + self.positions  # [B, T, C]
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, -1)
        x = self.head(modulate(self.norm(x), shift, scale))  # [B, T, out_channels * p * p]
        side = self.config.image_size // self.config.patch
        patches = x.transpose(1, 2).unflatten(2, (side, side))
        return {"noise": functional.pixel_shuffle(patches, self.config.patch)}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two noisy latents."""
        latent = example_images(self.config.in_channels, self.config.image_size)
        return {"latent": latent, "timestep": torch.tensor([20.0, 700.0]), "label": torch.tensor([1, 7])}


_SOURCES = ("Peebles and Xie 2022, Scalable Diffusion Models with Transformers, arXiv 2212.09748",)

ARCHITECTURES = (
    Architecture("dit-micro", lambda: Dit(DitConfig()), _SOURCES, "DiT for 16 x 16 latents, 0.6 M parameters"),
    Architecture(
        "dit-s-2",
        lambda: Dit(DitConfig(image_size=32, width=384, depth=12, heads=6, classes=1000)),
        _SOURCES,
        "DiT-S/2 for 32 x 32 latents, 33 M parameters",
    ),
)
