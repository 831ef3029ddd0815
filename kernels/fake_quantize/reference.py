"""The definition of simulated uniform quantization.

    codes = clip(round(x / scale) + zero, 0, 2^bits - 1)
    y     = (codes - zero) * scale

Nothing executes in integers: the result has the dtype of ``x`` and at most ``2^bits`` different values per scale.  It
stands where no processor has a kernel for so few bits.
"""

from __future__ import annotations

import torch

__all__ = ["affine_range", "fake_quantize", "round_through"]


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    *,
    bits: int,
    per_token: bool = False,
) -> torch.Tensor:
    """Quantize and dequantize, halves rounded to even (Jacob et al., arXiv 1712.05877, section 2.1).

    Gradients go straight through the rounding (Bengio et al., arXiv 1308.3432): to ``x`` where it is not clipped, and
    to ``scale``, which makes it a learned step size (Esser et al., LSQ, arXiv 1902.08153).

    Args:
        x: ``[..., C]``.
        scale: What one step is worth: a scalar, or ``[C]``.  Without it the range of ``x`` itself is taken, widened to
            hold zero, so that what is computed depends on all that shares the range.
        zero: The code of zero, whole numbers of any dtype in the shape of ``scale``; it may lie outside of the codes,
            for values whose range does not hold zero.  Without it, ``2^(bits-1)``.  Only together with ``scale``.
        bits: Of a code, 2 to 8.
        per_token: Without ``scale``: a range for each row of the last axis, instead of one for all of ``x``.

    Returns:
        The shape and dtype of ``x``.

    """
    last = 2**bits - 1
    if scale is None:
        scale, shift = affine_range(x.detach(), bits=bits, per_token=per_token)
    else:
        shift = scale.new_full((), 2 ** (bits - 1)) if zero is None else zero.to(scale.dtype)
    # clipping first is the same, as the ends are whole numbers, and holds for infinite values
    steps = (x / scale).clamp(-shift, last - shift)
    return round_through(steps) * scale


def affine_range(x: torch.Tensor, *, bits: int, per_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of the range of ``x``, widened to hold zero: scalars, or ``[..., 1]`` per token."""
    axes = [x.dim() - 1] if per_token else list(range(x.dim()))
    low = x.amin(axes, keepdim=per_token).clamp(max=0)
    high = x.amax(axes, keepdim=per_token).clamp(min=0)
    last = 2**bits - 1
    scale = torch.where(high > low, (high - low) / last, torch.ones_like(high))
    return scale, (-low / scale).round().clamp(0, last)


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round, halves to even, with the gradient of the identity; ``x`` must be finite."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()
