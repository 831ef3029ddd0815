"""Masks that are fixed beforehand: which blocks of a map matter, and how they go on behind what was seen.

DAM (Zhang et al., arXiv 2506.11104) on blocks instead of single pairs, so that what a mask hides is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from xformopt.errors import PassError
from xformopt.passes.sparsify.support.attention_maps import BlockMap

__all__ = ["amplified", "box_cox", "extend_mask", "select_blocks"]

# a pattern is told by a quarter of the rows of a map at least
_SUPPORT = 4


def box_cox(x: torch.Tensor, power: float) -> torch.Tensor:
    """Return ``(x ** power - 1) / power``, the logarithm at 0; small values move apart where the power is below 1."""
    return (x**power - 1) / power if power else x.clamp(min=torch.finfo(x.dtype).tiny).log()


def amplified(found: BlockMap, power: float) -> torch.Tensor:
    """Return a map after a Box-Cox transformation, brought to [0, 1] in each head, ``[H, N, N]``."""
    visible = _meeting(found)
    shaped = box_cox(found.mean, power)
    low = shaped.masked_fill(~visible, float("inf")).amin((1, 2), keepdim=True)
    high = shaped.masked_fill(~visible, float("-inf")).amax((1, 2), keepdim=True)
    brought: torch.Tensor = (shaped - low) / (high - low).clamp(min=torch.finfo(shaped.dtype).tiny)
    return brought


def select_blocks(
    maps: Mapping[str, BlockMap], scores: Mapping[str, torch.Tensor], keep: float
) -> dict[str, torch.Tensor]:
    """Return the mask of each layer, ``[H, N, N]`` bool, that keep a share of all visible blocks together.

    The blocks whose score is above one threshold for all layers and heads stay, the threshold being that at which as
    many stay as asked for.  Blocks on the diagonal stay in any case, so that every query sees a key at every length.

    Args:
        maps: Tell which blocks queries and keys share.
        scores: What each block is worth, ``[H, N, N]``, by layer.
        keep: The share.

    Raises:
        PassError: the diagonals alone are more than that.

    """
    ranked, fixed, total = {}, 0, 0
    for name, found in maps.items():
        visible = _meeting(found)
        diagonal = torch.eye(len(found.queries), dtype=torch.bool)
        hidden = scores[name].masked_fill(~visible, float("-inf"))
        ranked[name] = hidden.masked_fill(diagonal, float("inf"))
        total += len(hidden) * int((visible | diagonal).sum())
        fixed += len(hidden) * len(diagonal)
    wanted = round(keep * total)
    if wanted < fixed:
        raise PassError(
            f"Keeping {keep:.0%} of the attention leaves {wanted} of {total} blocks, and those on the diagonals alone, "
            f"which every query needs, are {fixed}. Keep more, or choose smaller blocks."
        )
    flat = torch.cat([score.reshape(-1) for score in ranked.values()])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.topk(wanted).indices] = True
    parts = kept.split([score.numel() for score in ranked.values()])
    return {name: part.reshape(score.shape) for part, (name, score) in zip(parts, ranked.items(), strict=True)}


def _meeting(found: BlockMap) -> torch.Tensor:
    return found.visible & (found.queries > 0)


def extend_mask(mask: torch.Tensor, size: int, match: float, *, causal: bool) -> torch.Tensor:
    """Continue masks ``[H, N, N]`` to ``[H, size, size]`` by the patterns they hold.

    The pool of patterns is DAM's: diagonals (blocks at one distance) and columns (a block that all later queries see),
    and, where queries see later keys, rows.  One after the other is found, the one first that explains most of what the
    mask keeps; it counts where the mask keeps at least the share ``match`` of those of its blocks that no pattern
    before it has.
    """
    heads, known = mask.shape[:2]
    if size <= known:
        return mask[:, :size, :size]
    distances = range(0 if causal else 1 - known, known)
    pool = [_Pattern("distance", number) for number in distances]
    pool += [_Pattern("key", number) for number in range(known)]
    pool += [_Pattern("query", number) for number in range(0 if causal else known)]
    drawn = torch.stack([pattern.drawn(known, causal=causal) for pattern in pool]).flatten(1).double()  # [P, N * N]
    extended = torch.zeros(heads, size, size, dtype=torch.bool)
    for head in range(heads):
        found = torch.eye(size, dtype=torch.bool)
        for index in _explaining(drawn, mask[head].flatten().double(), match, max(known // _SUPPORT, 2)):
            found |= pool[index].drawn(size, causal=causal)
        found[:known, :known] = mask[head]
        extended[head] = found
    return extended


@dataclass(frozen=True)
class _Pattern:
    """Blocks at one ``distance``, or those of one block of keys (``key``) or queries (``query``)."""

    kind: Literal["distance", "key", "query"]
    number: int

    def drawn(self, size: int, *, causal: bool) -> torch.Tensor:
        """Return the pattern among ``size`` blocks each way, ``[size, size]`` bool."""
        at = torch.arange(size)
        back = at[:, None] - at
        places = {"distance": back, "key": at.expand(size, size), "query": at[:, None].expand(size, size)}
        found = places[self.kind] == self.number
        return found & (back >= 0) if causal else found


def _explaining(drawn: torch.Tensor, kept: torch.Tensor, match: float, least: int) -> list[int]:
    """Return which patterns ``[P, cells]`` explain the cells that are kept, with ``least`` cells of its own each."""
    chosen: list[int] = []
    left = torch.ones_like(kept)
    while True:
        cells, hits = drawn @ left, drawn @ (left * kept)
        fits = (cells >= least) & (hits >= match * cells)
        if not bool(fits.any()):
            return chosen
        best = int(hits.where(fits, torch.tensor(-1.0, dtype=hits.dtype)).argmax())
        chosen.append(best)
        left = left * (1 - drawn[best])
