"""The definition of the assignment of tokens to anchors."""

from __future__ import annotations

import torch

from xformopt.kernels.rank_tokens.reference import rank_tokens

__all__ = ["transform_tokens"]


def transform_tokens(
    metric: torch.Tensor,
    scores: torch.Tensor,
    sizes: torch.Tensor | None = None,
    *,
    prefix: int,
    neighbours: int,
    temperature: float,
    r: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices that mix tokens into fewer ones and back (after Zeng et al., arXiv 2506.05709).

    ``X' = W X`` with rows that sum to 1 holds pruning (one-hot rows) and merging (rows that average disjoint sets) as
    special cases; here the sets overlap.  The paper leaves W open; this one is built so: the best-scored tokens are
    anchors, each token takes part in its most similar anchors, and a row is the softmax of similarities over those that
    take part in it.

    Args:
        metric: What is compared by its cosine, ``[B, T, C]``.
        scores: Importance, ``[B, T]``.
        sizes: How many tokens each one stands for, ``[B, T]``; a weight in W; 0: padding, which takes no part.
        prefix: How many tokens at the front stay alone.
        neighbours: In how many anchors a token takes part.
        temperature: Of the softmax.
        r: How many tokens fewer there are to be.

    Returns:
        ``mix`` ``[B, N, T]``, rows that sum to 1 (0 for an anchor that is padding): ``X' = mix X``.  ``share``, the
        same with columns that sum to 1: sizes become ``share sizes``, and ``X ~ share^T X'``.

    """
    B, T = metric.shape[:2]
    tiny = torch.finfo(metric.dtype).tiny
    anchors = rank_tokens(scores, prefix=prefix, r=r)[:, prefix:]
    unit = metric / metric.norm(dim=2, keepdim=True).clamp(min=tiny)
    chosen = unit.gather(1, anchors.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    similarity = chosen @ unit[:, prefix:].transpose(1, 2)  # [B, N, T] behind the prefix
    count = min(neighbours, similarity.shape[1])
    least = similarity.topk(count, 1).values[:, -1:] if count else similarity[:, :0].sum(1, keepdim=True)
    # a cosine is at most 1
    weights = ((similarity - 1) / temperature).exp() * (similarity >= least).to(metric.dtype)
    if sizes is not None:
        weights = weights * sizes[:, None, prefix:]
    mix = weights / weights.sum(2, keepdim=True).clamp(min=tiny)
    share = mix / mix.sum(1, keepdim=True).clamp(min=tiny)
    alone = torch.eye(prefix, T, dtype=metric.dtype, device=metric.device).expand(B, -1, -1)
    pad = torch.nn.functional.pad
    return torch.cat([alone, pad(mix, (prefix, 0))], 1), torch.cat([alone, pad(share, (prefix, 0))], 1)
