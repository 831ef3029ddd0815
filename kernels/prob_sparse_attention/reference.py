"""The definition of ProbSparse attention."""

from __future__ import annotations

import math

import torch

from xformopt.kernels.chunks import join_heads, split_heads
from xformopt.kernels.masked_softmax import divided, masked_softmax

__all__ = ["active_queries", "prob_sparse_attention"]


def active_queries(T: int, factor: float) -> int:
    """Return how many of ``T`` queries attend: ``factor ln T``, rounded up; one at least, all at most."""
    return min(max(math.ceil(factor * math.log(T)), 1), T)


def prob_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sample: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    factor: float,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of the most telling queries: Informer's ProbSparse (Zhou et al., AAAI 2021, arXiv 2012.07436).

    A query is rated by ``max_j - mean_j`` of its logits on a sample of keys.  In each head the ``factor ln T`` that
    are rated highest attend to all keys; the others get the mean of the values.  The sample is one for all queries, so
    that rating is a product; the paper draws one for each.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        sample: Where the keys stand that rate the queries, as shares of the length, ``[U]`` in [0, 1): key
            ``floor(sample * T)``.
        key_mask: Which tokens exist, ``[B, T]`` bool (True: attend); those that do not are rated last as queries.
        bias: Added to the scaled logits, ``[1 or B, 1 or heads, T, T]``.
        heads: Number of heads.
        scale: Factor of the logits.
        factor: Queries that attend, for each e-fold of the length.
        causal: Query ``i`` sees no key after ``i``, and the mean is that of the values up to its own.  Which queries
            attend depends on later tokens even then: they are rated against each other, on keys anywhere.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    B, T = q.shape[:2]
    at = torch.arange(T, device=q.device)
    exists = key_mask if key_mask is not None else torch.ones(B, T, dtype=torch.bool, device=q.device)
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))
    rating = _rating(q, k, (sample.double() * T).long().clamp(max=T - 1), exists, bias).detach()
    # stable: of equal ratings, the first
    order = rating.sort(dim=-1, descending=True, stable=True).indices
    chosen = order[..., : active_queries(T, factor), None]  # [B, H, u, 1]
    logits = q.gather(2, chosen.expand(-1, -1, -1, q.shape[-1])) @ k.transpose(-1, -2)  # [B, H, u, T]
    if bias is not None:
        logits = logits + bias.expand(B, heads, T, T).gather(2, chosen.expand(-1, -1, -1, T))
    visible = exists[:, None, None, :]
    if causal:
        visible = visible & (at <= chosen)
    attended = masked_softmax(logits, visible) @ v
    known = exists[:, None, :, None].to(v.dtype)  # [B, 1, T, 1]
    if causal:
        means = divided((v * known).cumsum(2), known.cumsum(2))
    else:
        means = divided((v * known).sum(2, keepdim=True), known.sum(2, keepdim=True)).expand_as(v)
    return join_heads(means.scatter(2, chosen.expand_as(attended), attended))


def _rating(
    q: torch.Tensor, k: torch.Tensor, places: torch.Tensor, exists: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return how far each query is from uniform attention, ``[B, H, T]``; ``places [U]`` are those of the keys."""
    logits = q @ k[:, :, places].transpose(-1, -2)  # [B, H, T, U]
    if bias is not None:
        logits = logits + bias[..., places]
    seen = exists[:, None, None, places]
    count = seen.sum(-1)
    mean = divided(torch.where(seen, logits, 0.0).sum(-1), count.to(q.dtype))
    peak = torch.where(count > 0, logits.masked_fill(~seen, float("-inf")).amax(-1), 0.0)
    return (peak - mean).masked_fill(~exists[:, None], float("-inf"))
