"""The definition of bipartite soft matching."""

from __future__ import annotations

import torch

__all__ = ["FORBIDDEN", "FREE", "match_tokens"]

# beyond what a cosine reaches: a padded token goes first, a real one joins padding last
FREE, FORBIDDEN = 2.0, -2.0


def match_tokens(
    keys: torch.Tensor,
    sizes: torch.Tensor | None = None,
    *,
    heads: int,
    prefix: int,
    r: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pair similar tokens (Bolya et al., ToMe, arXiv 2210.09461, section 3).

    Tokens are compared by the cosine of their keys, averaged over heads.  Those behind the prefix are dealt out in turn
    to two sets A and B; every token of A finds the most similar one in B, and the ``r`` most similar pairs are merged.

    Args:
        keys: ``[B, T, heads * D]``; the channels of one head are adjacent.
        sizes: How many tokens each one stands for, ``[B, T]``; 0 marks padding, which is merged before anything else,
            and which a real token joins last.
        heads: Heads of the keys.
        prefix: How many tokens at the front stay as they are (class and distillation token).
        r: Tokens to merge away, at most half of those behind the prefix, of which there are two at least.

    Returns:
        Indices, int64: ``kept`` ``[B, T - r]``, the tokens that stay: the prefix, the rest of A by falling similarity,
        all of B; ``sources`` ``[B, r]``, the tokens merged away; ``destinations`` ``[B, r]``, the place in ``kept`` of
        the token that each of them joins.

    """
    B, T = keys.shape[:2]
    metric = keys.unflatten(2, (heads, keys.shape[2] // heads)).mean(2)  # [B, T, D]
    metric = metric / metric.norm(dim=2, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
    similarity = metric[:, prefix::2] @ metric[:, prefix + 1 :: 2].transpose(1, 2)  # [B, A, B]
    if sizes is not None:
        similarity = similarity.masked_fill(sizes[:, None, prefix + 1 :: 2] == 0, FORBIDDEN)
        similarity = similarity.masked_fill(sizes[:, prefix::2, None] == 0, FREE)
    best, partner = similarity.max(2)
    order = best.sort(dim=1, descending=True, stable=True).indices
    merged, rest = order[:, :r], order[:, r:]
    first = torch.arange(prefix, device=keys.device).expand(B, -1)
    other = prefix + 1 + 2 * torch.arange((T - prefix) // 2, device=keys.device).expand(B, -1)
    kept = torch.cat([first, prefix + 2 * rest, other], 1)
    return kept, prefix + 2 * merged, prefix + rest.shape[1] + partner.gather(1, merged)
