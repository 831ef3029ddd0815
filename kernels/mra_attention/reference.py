"""The definition of multi-resolution attention."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from xformopt.kernels.chunks import chunk_count, join_heads, split_heads
from xformopt.kernels.masked_softmax import divided

__all__ = ["mra_attention", "refined_blocks"]

# above every score: blocks on the diagonal come first
_FIRST = 1e4


def refined_blocks(N: int, keep: float, *, causal: bool) -> int:
    """Return how many of ``N x N`` blocks are exact in each head: a share of the visible ones, ``N`` at least."""
    visible = N * (N + 1) // 2 if causal else N * N
    return max(N, math.ceil(keep * visible))


def mra_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    keep: float,
    causal: bool = False,
    coarse: bool = True,
) -> torch.Tensor:
    """Attention at two resolutions: MRA-2 (Zeng et al., ICML 2022, arXiv 2207.10284).

    ``Q~``, ``K~``, ``V~`` are means over the tokens of each block that exist.  The blocks with the largest
    ``L = scale Q~ K~^T`` in the whole matrix of a head, those on the diagonal first, have their exact weights
    ``exp(scale q k^T)``; each key of any other block m weighs ``exp(L_nm)`` for the queries of block n, so that the
    block adds ``exp(L_nm) |m| V~_m``.  One normaliser serves both.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        key_mask: Which tokens exist, ``[B, T]`` bool (True: attend).
        bias: Added to the scaled logits, ``[1 or B, 1 or heads, T, T]``; L has its mean over a block.
        heads: Number of heads.
        scale: Factor of the logits.
        block: Tokens of a block.
        keep: Share of the visible blocks that are exact; every block on the diagonal is.
        causal: Query ``i`` sees no key after ``i``; blocks of means are strictly before its own.
        coarse: Whether the other blocks count by their means; False is MRA-2-s.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    B, T = q.shape[:2]
    N = chunk_count(T, block)
    exists = key_mask if key_mask is not None else torch.ones(B, T, dtype=torch.bool, device=q.device)
    exists = functional.pad(exists, (0, N * block - T)).unflatten(1, (N, block))[:, None]  # [B, 1, N, b]
    q, k, v = (
        functional.pad(split_heads(x, heads), (0, 0, 0, N * block - T)).unflatten(2, (N, block)) for x in (q, k, v)
    )  # [B, H, N, b, .]
    count = exists.sum(-1, keepdim=True).to(q.dtype)  # [B, 1, N, 1]
    means = [divided((x * exists.unsqueeze(-1)).sum(3), count) for x in (q, k, v)]  # [B, H, N, .]
    scores = scale * means[0] @ means[1].transpose(-1, -2)  # [B, H, N, N]
    logits = scale * torch.einsum("bhnid,bhmjd->bhnmij", q, k)  # [B, H, N, N, b, b]
    if bias is not None:
        pairs = functional.pad(bias, (0, N * block - T, 0, N * block - T))
        pairs = pairs.unflatten(3, (N, block)).unflatten(2, (N, block)).transpose(3, 4)  # [., ., N, N, b, b]
        logits = logits + pairs
        both = exists[:, :, :, None, :, None] & exists[:, :, None, :, None, :]
        scores = scores + divided((pairs * both).sum((-1, -2)), both.sum((-1, -2)).to(q.dtype))
    visible = torch.ones(N, N, dtype=torch.bool, device=q.device)
    visible = visible.tril() if causal else visible
    exact = _chosen(scores.detach(), visible, exists, refined_blocks(N, keep, causal=causal))
    at = torch.arange(N * block, device=q.device).unflatten(0, (N, block))
    seen = exact[..., None, None] & exists[:, :, None, :, None, :]
    if causal:
        seen = seen & (at[:, None, :, None] >= at[None, :, None, :])
    means_count = visible & ~exact & (count > 0).transpose(-1, -2) & coarse  # [B, H, N, N]
    logits = logits.masked_fill(~seen, float("-inf"))
    scores = scores.masked_fill(~means_count, float("-inf"))
    peak = torch.maximum(logits.detach().amax((3, 5)), scores.detach().amax(-1, keepdim=True))  # [B, H, N, b]
    peak = peak.clamp(min=torch.finfo(q.dtype).min)
    weights = (logits - peak[:, :, :, None, :, None]).exp()
    means_weights = (scores.unsqueeze(3) - peak.unsqueeze(-1)).exp() * count.transpose(-1, -2).unsqueeze(3)
    total = weights.sum((3, 5)) + means_weights.sum(-1)  # [B, H, N, b]
    summed = torch.einsum("bhnmij,bhmje->bhnie", weights, v) + means_weights @ means[2].unsqueeze(2)
    return join_heads(divided(summed, total.unsqueeze(-1)).flatten(2, 3)[:, :, :T])


def _chosen(scores: torch.Tensor, visible: torch.Tensor, exists: torch.Tensor, count: int) -> torch.Tensor:
    """Return which blocks are exact, ``[B, H, N, N]``: the diagonal, then the best; those without tokens last."""
    N = len(visible)
    used = exists.any(-1)  # [B, 1, N]
    hidden = ~(visible & used.unsqueeze(2) & used.unsqueeze(3))
    diagonal = torch.eye(N, dtype=torch.bool, device=scores.device)
    ranked = scores.masked_fill(hidden, -_FIRST).masked_fill(diagonal, _FIRST)
    found = ranked.flatten(2).topk(count).indices
    chosen = torch.zeros_like(ranked, dtype=torch.bool).flatten(2).scatter(2, found, True)
    apart: torch.Tensor = chosen.unflatten(2, (N, N))
    return apart & visible
