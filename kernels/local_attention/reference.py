"""The definition of local attention."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import join_heads, split_heads
from xformopt.kernels.masked_softmax import masked_softmax

__all__ = ["local_attention", "local_keys"]


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    window_left: int,
    window_right: int = 0,
    dilation: int = 1,
    stripe: int = 0,
    causal: bool = False,
) -> torch.Tensor:
    """``softmax(scale q k^T + bias) v`` per head over the keys near a query, and over those in its stripe.

    Windows and dilation are those of Longformer (Beltagy et al., arXiv 2004.05150); stripes are the strided pattern of
    Sparse Transformers (Child et al., arXiv 1904.10509).  A token stripe of an image (all rows of one column, CSWin,
    arXiv 2107.00652) is a stripe as far apart as the image has columns.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        key_mask: Which keys exist, ``[B, T]`` bool (True: attend).
        bias: Added to the scaled logits, ``[1 or B, 1 or heads, T, T]``; a window with it has neither dilation nor
            stripes.
        heads: Number of heads.
        scale: Factor of the logits.
        window_left: How many keys before its own position a query sees.
        window_right: How many keys after it.
        dilation: Distance between neighbouring keys of a window.
        stripe: A query also sees every key at a multiple of this distance; 0: no stripes.
        causal: A query sees no key after its own position; ``window_right`` is 0 then.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    visible = local_keys(q.shape[1], window_left, window_right, dilation, stripe, causal, device=q.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))
    logits = q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return join_heads(masked_softmax(logits, visible) @ v)


def local_keys(
    T: int, left: int, right: int, dilation: int, stripe: int, causal: bool, device: torch.device | None = None
) -> torch.Tensor:
    """Return which key each query may see by position alone, ``[T, T]`` bool."""
    at = torch.arange(T, device=device)
    back = at[:, None] - at  # i - j
    visible = (back % dilation == 0) & (back <= left * dilation) & (back >= -right * dilation)
    if stripe:
        visible |= back % stripe == 0
    return visible & (back >= 0) if causal else visible
