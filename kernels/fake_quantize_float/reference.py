"""The definition of simulated floating-point quantization with scales found at run time.

    s = max|x| / largest value of the format, for each row of the last axis
    y = s round(x / s)

The range of each token is taken from the token itself: in diffusion transformers it follows the content of the patch
and the time step (Chen et al., FP4DiT, arXiv 2503.15465, "online" activation quantization).  Nothing executes in few
bits: the result has the dtype of ``x``.
"""

from __future__ import annotations

import torch

from xformopt.kernels.float_formats import FORMATS, round_float

__all__ = ["fake_quantize_float"]


def fake_quantize_float(x: torch.Tensor, *, format: str) -> torch.Tensor:
    """Round ``[..., C]`` to a format of ``kernels.float_formats.FORMATS``, halves to even, a scale per token.

    Gradients go straight through the rounding to ``x``; no element is clipped, as the scale is that of the largest.

    Returns:
        The shape and dtype of ``x``.

    """
    found = x.detach()
    scale = found.abs().amax(-1, keepdim=True) / FORMATS[format].largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = round_float(found / scale, format) * scale
    return x + (rounded - found) if x.requires_grad else rounded
