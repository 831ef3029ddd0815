"""The definition of a linear layer whose products are of 8-bit integers.

    codes = clip(round(x / x_scale) + x_zero, 0, 255)
    y     = (codes - x_zero) weight^T * (x_scale * scale) + bias

Activations are unsigned with a zero point and one range for the whole tensor, weights signed with one scale per output
channel.  The sum of products is exact, as in hardware with 32-bit accumulators (AVX-512 VNNI, AMX, Arm dot products).
x86 without VNNI adds two products in 16 bits, which saturate; weights within 7 bits cannot reach that.
"""

from __future__ import annotations

import torch

from xformopt.kernels.fake_quantize import round_through

__all__ = ["dynamic_range", "quantize_activation", "quantized_linear"]

# of codes and weights of 8 bits, this many products add up to less than 2^24, below which float32 is exact
_EXACT_COLUMNS = 512


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer in 8-bit integers.

    Gradients go straight through the rounding of activations (Bengio et al., arXiv 1308.3432): to ``x`` where it is not
    clipped, to ``x_scale``, ``scale`` and ``bias``, but not to the range of ``x`` that is taken itself.

    Args:
        x: Activations, ``[..., I]``.
        weight: int8, ``[O, I]``.
        scale: What one step of each output channel's weights is worth, ``[O]``.
        bias: ``[O]``, not quantized.
        x_scale: What one step of the activations is worth, a scalar; without it the range of ``x`` itself is taken.
        x_zero: uint8, the code of zero, a scalar; given together with ``x_scale``.

    Returns:
        ``[..., O]`` in the dtype of ``x``.

    """
    if x_scale is None or x_zero is None:
        x_scale, x_zero = dynamic_range(x.detach())
    codes = quantize_activation(x, x_scale, x_zero).float() - x_zero.float()
    total = codes.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float64)
    for part, block in zip(codes.split(_EXACT_COLUMNS, -1), weight.split(_EXACT_COLUMNS, -1), strict=True):
        total += part @ block.float().t()
    result = total.to(x.dtype) * (x_scale * scale)
    return result if bias is None else result + bias


def dynamic_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point (uint8) of the range of ``x``, widened to hold zero; ONNX DynamicQuantizeLinear."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = torch.where(high > low, (high - low) / 255, torch.ones_like(high))
    return scale, (-low / scale).round().clamp(0, 255).to(torch.uint8)


def quantize_activation(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return ``clip(round(x / scale) + zero, 0, 255)``, halves rounded to even, in the dtype of ``x``."""
    return (round_through(x / scale) + zero).clamp(0, 255)
