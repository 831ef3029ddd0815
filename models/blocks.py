"""Parts that several families are made of.

A sequence of tokens is ``[B, T, C]``; an image is the sequence of its rows, and whoever needs neighbours above and
below knows the grid ``(rows, columns)`` the tokens stand on.  Following MetaFormer (Yu et al., arXiv 2111.11418), a
block is a *token mixer* and a *channel mixer*, each on a residual path, whatever these are: both take and return
``[B, T, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Attention",
    "Block",
    "CrossBlock",
    "DepthwiseMlp",
    "GatedMlp",
    "Grid",
    "Identity",
    "Mlp",
    "PatchEmbedding",
    "PostNormBlock",
    "conv_norm",
    "draw_weights",
    "from_windows",
    "merge_heads",
    "next_grid",
    "position_parameter",
    "sinusoids",
    "split_heads",
    "to_map",
    "to_tokens",
    "to_windows",
]

Grid: TypeAlias = tuple[int, int]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, heads * D]`` to ``[B, heads, T, D]``."""
    x = x.unflatten(-1, (heads, x.shape[-1] // heads))
    return x.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, heads, T, D]`` to ``[B, T, heads * D]``."""
    return x.transpose(1, 2).flatten(2)


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """``[B, H * W, C]`` to the feature map ``[B, C, H, W]``."""
    x = x.transpose(1, 2).unflatten(2, grid)
    return x


def to_tokens(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H * W, C]``."""
    return x.flatten(2).transpose(1, 2)


def to_windows(x: Tensor, grid: Grid, window: Grid) -> Tensor:
    """``[B, H * W, C]`` to ``[B * windows, h * w, C]``: the grid cut into windows of ``h x w``, row by row."""
    (rows, columns), (h, w) = grid, window
    x = x.unflatten(1, (rows // h, h, columns // w, w))  # [B, H / h, h, W / w, w, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, grid: Grid, window: Grid) -> Tensor:
    """Undo :func:`to_windows`."""
    (rows, columns), (h, w) = grid, window
    x = x.unflatten(0, (-1, rows // h, columns // w)).unflatten(3, (h, w))  # [B, H / h, W / w, h, w, C]
    return x.transpose(2, 3).flatten(1, 4)


def next_grid(grid: Grid, kernel: int, stride: int, padding: int) -> Grid:
    """Return the grid a convolution leaves."""
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in grid)
    return rows, columns


def position_parameter(tokens: int, width: int) -> nn.Parameter:
    """Return learned positions ``[1, tokens, width]``, drawn as ViT does."""
    return nn.Parameter(torch.randn(1, tokens, width) * 0.02)


def sinusoids(positions: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Return ``[..., width]``: sines, then cosines, of ``positions`` at wavelengths from 2 pi to ``2 pi * longest``."""
    frequencies = torch.exp(torch.arange(width // 2) * (-2 * math.log(longest) / width))
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def draw_weights(model: nn.Module, deviation: float = 0.02) -> None:
    """Draw the weights of linear layers and embeddings from a normal distribution, and clear the biases (GPT-2)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def conv_norm(
    width_in: int, width: int, kernel: int = 1, stride: int = 1, padding: int = 0, groups: int = 1
) -> nn.Sequential:
    """Return a convolution and its batch norm, which inference folds into the convolution."""
    convolution = nn.Conv2d(width_in, width, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


class PatchEmbedding(nn.Module):
    """Cut an image into patches and project each: ``[B, C_in, H, W]`` to ``[B, T, width]``."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """Return the tokens, row by row."""
        return to_tokens(self.projection(image))


class Identity(nn.Module):
    """The token mixer that mixes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class Attention(nn.Module):
    """Multi-head softmax attention (Vaswani et al., arXiv 1706.03762), of a sequence to itself or to another one.

    Args:
        width: Channels in and out.
        heads: Query heads.
        kv_heads: Key and value heads, each shared by as many query heads (Ainslie et al., arXiv 2305.13245); None: all.
        bias: Whether queries, keys and values have one; the output projection has one with them.
        causal: Whether a token sees only itself and what comes before.
        context_width: Channels of the other sequence; None: ``width``.
        head_width: Channels of a head; None: ``width / heads``.
        scale: Factor of the logits; None: ``head_width ** -0.5``.

    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        causal: bool = False,
        context_width: int | None = None,
        head_width: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal, self.scale = heads, kv_heads or heads, causal, scale
        head_width = head_width or width // heads
        context_width = context_width or width
        self.query = nn.Linear(width, heads * head_width, bias)
        self.key = nn.Linear(context_width, self.kv_heads * head_width, bias)
        self.value = nn.Linear(context_width, self.kv_heads * head_width, bias)
        self.output = nn.Linear(heads * head_width, width, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: ``[B, T, C]``, the queries' sequence.
            mask: Broadcasts to ``[B, heads, T, S]``; boolean: True may be seen; float: added to the logits.
            context: ``[B, S, C]``, the keys' and values' sequence; None: ``x``.

        """
        context = x if context is None else context
        q = split_heads(self.query(x), self.heads)  # [B, H, T, D]
        k = split_heads(self.key(context), self.kv_heads)  # [B, G, S, D]
        v = split_heads(self.value(context), self.kv_heads)
        x = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.kv_heads != self.heads
        )
        x = self.output(merge_heads(x))
        return x


class Mlp(nn.Module):
    """The channel mixer of a transformer: widen, activate, narrow."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU, bias: bool = True
    ) -> None:
        super().__init__()
        self.widen = nn.Linear(width, hidden, bias)
        self.activation = activation()
        self.narrow = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape, each token by itself."""
        x = self.narrow(self.activation(self.widen(x)))
        return x


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202) or another gated unit: ``W_3 (act(W_1 x) * W_2 x)``."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[], nn.Module] = nn.SiLU, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias)
        self.up = nn.Linear(width, hidden, bias)
        self.activation = activation()
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape, each token by itself."""
        x = self.down(self.activation(self.gate(x)) * self.up(x))
        return x


class DepthwiseMlp(nn.Module):
    """An MLP whose hidden channels also see their 3 x 3 neighbours, which tells a token where it stands (PVT v2)."""

    def __init__(self, width: int, hidden: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.widen = nn.Linear(width, hidden)
        self.neighbours = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        x = self.neighbours(to_map(self.widen(x), self.grid))
        x = self.narrow(functional.gelu(to_tokens(x)))
        return x


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        width: Channels.
        mixer: Token mixer; what the block is called with beside ``x`` goes to it.
        mlp: Channel mixer.
        norm: Makes a norm from the width.
        layer_scale: Initial factor of each residual path per channel (arXiv 2103.17239); None: no factor.

    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = norm(width), mixer
        self.mlp_norm, self.mlp = norm(width), mlp
        self.mixer_scale = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale is not None else None
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale is not None else None

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        mixed = self.mixer(self.mixer_norm(x), *context)
        x = x + (mixed if self.mixer_scale is None else mixed * self.mixer_scale)
        mixed = self.mlp(self.mlp_norm(x))
        x = x + (mixed if self.mlp_scale is None else mixed * self.mlp_scale)
        return x


class PostNormBlock(nn.Module):
    """``norm(x + mixer(x))``, then ``norm(x + mlp(x))``: the transformer's first form."""

    def __init__(self, width: int, mixer: nn.Module, mlp: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.mixer, self.mixer_norm = mixer, nn.LayerNorm(width, eps)
        self.mlp, self.mlp_norm = mlp, nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """``[B, T, C]`` to the same shape; ``context`` goes to the mixer."""
        x = self.mixer_norm(x + self.mixer(x, *context))
        x = self.mlp_norm(x + self.mlp(x))
        return x


class CrossBlock(nn.Module):
    """A decoder's block: a token mixer, attention to the encoder's result, a channel mixer."""

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        cross: Attention,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = norm(width), mixer
        self.cross_norm, self.cross = norm(width), cross
        self.mlp_norm, self.mlp = norm(width), mlp

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Mix ``x`` ``[B, T, C]`` under ``mask`` with ``memory`` ``[B, S, C]`` under ``memory_mask``."""
        normed = self.mixer_norm(x)
        x = x + (self.mixer(normed) if mask is None else self.mixer(normed, mask))
        x = x + self.cross(self.cross_norm(x), memory_mask, memory)
        x = x + self.mlp(self.mlp_norm(x))
        return x
