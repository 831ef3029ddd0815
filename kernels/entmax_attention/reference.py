"""The definition of entmax attention: the threshold of a row by Halley's method inside of a bracket."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import join_heads, split_heads

__all__ = ["entmax", "entmax_attention", "steps"]

# for the digits of double precision
_MORE = 3


def steps(alpha: float) -> int:
    """Return how many steps from the lower end of the bracket find the threshold in single precision.

    About half the logarithm of the number of keys bring in the last key, then the number of digits triples.  Counted
    for 8,192 keys of any spread: at most 8 and 10.
    """
    return 8 if alpha <= 1.75 else 11


def entmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    alpha: float = 1.5,
    causal: bool = False,
) -> torch.Tensor:
    """``entmax_alpha(scale q k^T) v`` per head (AdaSplash, Goncalves et al., arXiv 2502.12082).

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, S, heads * D]``.
        v: Values, ``[B, S, heads * E]``.
        key_mask: Which keys exist, ``[B, S]`` bool (True: attend).
        heads: Number of heads.
        scale: Factor of the scores.
        alpha: Above 1 and at most 2, which is sparsemax; softmax is the limit at 1.
        causal: Query ``i`` sees no key after ``i``.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))
    return join_heads(entmax(q @ k.transpose(-1, -2), visible, alpha) @ v)


def entmax(scores: torch.Tensor, visible: torch.Tensor, alpha: float) -> torch.Tensor:
    """``p = max((alpha - 1) s - t, 0) ** (1 / (alpha - 1))`` with the t at which a row sums up to one.

    The gradient is that of the solution and not of the steps that find it (Peters et al., arXiv 1905.05702):
    ``dp = u (ds - (u . ds) / sum u)`` with ``u = p ** (2 - alpha)`` where p is positive, and 0 elsewhere.

    Args:
        scores: ``[..., S]``.
        visible: Which of them count, broadcastable to the scores; a row without any gets zeros.
        alpha: Above 1, at most 2.

    Returns:
        ``[..., S]``.

    """
    weights = _solve(scores.detach(), visible, alpha)
    is_positive = weights > 0
    u = torch.where(is_positive, weights, 1.0) ** (2 - alpha) * is_positive
    change = torch.where(visible, scores, 0.0)
    change = change - change.detach()  # zero, with a gradient
    mean = (u * change).sum(-1, keepdim=True) / u.sum(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    return weights + u * (change - mean)


def _solve(scores: torch.Tensor, visible: torch.Tensor, alpha: float) -> torch.Tensor:
    """Find t between ``max - 1`` and ``max - S ** (1 - alpha)``; a step that leaves the bracket is halfway instead."""
    power = 1 / (alpha - 1)
    scaled = ((alpha - 1) * scores).masked_fill(~visible, float("-inf"))
    peak = scaled.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    # no threshold is below -1
    scaled = (scaled - peak).clamp(min=-2)
    low = torch.full_like(peak, -1.0)
    high = torch.full_like(peak, -(float(max(scores.shape[-1], 1)) ** (1 - alpha)))
    t = low
    for _ in range(steps(alpha) + _MORE):
        above = (scaled - t).clamp(min=0)
        is_above = above > 0
        second = torch.where(is_above, above, 1.0) ** (power - 2) * is_above
        # the sum of weights less one, and its first two derivatives
        f = (second * above**2).sum(-1, keepdim=True) - 1
        df = -power * (second * above).sum(-1, keepdim=True)
        ddf = power * (power - 1) * second.sum(-1, keepdim=True)
        low, high = torch.where(f > 0, t, low), torch.where(f > 0, high, t)
        step = t - 2 * f * df / (2 * df**2 - f * ddf)
        t = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
    weights = (scaled - t).clamp(min=0) ** power
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
