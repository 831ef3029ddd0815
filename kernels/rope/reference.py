"""The definition of rotary position embedding."""

from __future__ import annotations

import torch

__all__ = ["rope"]


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, interleaved: bool = False
) -> torch.Tensor:
    """Rotate pairs of features by an angle that grows with the position (Su et al., arXiv 2104.09864).

    Args:
        x: Queries or keys, ``[B, T, heads * D]``.
        cos: Cosines of the angles, ``[B or 1, T, R / 2]``; the first R features of a head are rotated.
        sin: Sines of the angles, as ``cos``.
        heads: Number of heads.
        interleaved: Pairs are features (2i, 2i + 1); otherwise (i, i + R / 2).

    Returns:
        ``[B, T, heads * D]``.

    """
    parts = x.unflatten(-1, (heads, -1))  # [B, T, H, D]
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated, kept = parts[..., : 2 * half], parts[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((rotated, kept), -1).flatten(-2)
