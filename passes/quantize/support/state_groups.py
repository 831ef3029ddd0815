"""Which channels of a state-space layer share a scale (Quamba2): heads with like profiles, and like places in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["StateGroups", "cluster_profiles", "contiguous_segments", "group_channels"]


@dataclass(frozen=True)
class StateGroups:
    """Groups of the channels of H heads with P channels each.

    Attributes:
        order: Channels of each head from the largest maximum to the smallest, ``[H, P]``.
        heads: Group of each head, ``[H]``.
        places: Group of each place in the order, for every group of heads, ``[groups, P]``.
        scales: What one step is worth in each group of heads and of places, ``[groups, segments]``.

    """

    order: torch.Tensor
    heads: torch.Tensor
    places: torch.Tensor
    scales: torch.Tensor

    def per_channel(self) -> torch.Tensor:
        """Return the scale of every channel as it lies in the tensor, ``[H * P]``."""
        sorted_scales = torch.stack([self.scales[group][self.places[group]] for group in self.heads.tolist()])
        return torch.empty_like(sorted_scales).scatter_(1, self.order, sorted_scales).flatten()

    def permutation(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the order of heads ``[H]`` and of channels ``[H * P]`` in which groups are contiguous.

        Args:
            blocks: Heads move within blocks of ``H / blocks`` neighbours, which share what writes and reads states.

        """
        count, width = self.order.shape
        heads = sorted(range(count), key=lambda head: (head * blocks // count, int(self.heads[head]), head))
        chosen = torch.tensor(heads)
        return chosen, (chosen.unsqueeze(1) * width + self.order[chosen]).flatten()


def group_channels(maxima: torch.Tensor, *, heads: int, head_groups: int, channel_groups: int) -> StateGroups:
    """Sort the channels of each head by their maxima, cluster heads by what they look like then, and places within.

    Args:
        maxima: The largest ``|x|`` of each channel, ``[H * P]``.
        heads: H.
        head_groups: Groups of heads, at most.
        channel_groups: Groups of places in each group of heads, at most.

    """
    per_head = maxima.double().reshape(heads, -1)
    found, order = per_head.sort(dim=1, descending=True, stable=True)
    profiles = found / found.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    labels = torch.tensor(cluster_profiles(profiles, head_groups))
    places, scales = [], []
    for group in range(int(labels.max()) + 1):
        largest = found[labels == group].amax(0)
        segments = contiguous_segments(largest.tolist(), channel_groups)
        places.append(torch.tensor(segments))
        tops = largest.new_zeros(channel_groups).scatter_reduce(0, places[-1], largest, "amax", include_self=False)
        steps = tops / 127
        scales.append(torch.where(steps > 0, steps, torch.ones_like(steps)))
    return StateGroups(order, labels, torch.stack(places), torch.stack(scales))


def cluster_profiles(profiles: torch.Tensor, count: int) -> list[int]:
    """Merge the two nearest clusters of rows (average linkage) until ``count`` are left; labels in order of rows."""
    distance = torch.cdist(profiles, profiles)
    clusters = [[row] for row in range(len(profiles))]
    while len(clusters) > count:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        gaps = [float(distance[clusters[i]][:, clusters[j]].mean()) for i, j in pairs]
        i, j = pairs[min(range(len(pairs)), key=gaps.__getitem__)]
        clusters[i] += clusters.pop(j)
    labels = [0] * len(profiles)
    for label, rows in enumerate(sorted(clusters, key=min)):
        for row in rows:
            labels[row] = label
    return labels


def contiguous_segments(values: Sequence[float], count: int) -> list[int]:
    """Cut a sequence into at most ``count`` runs of least squared deviation from their means; the label of each value.

    This is k-means with contiguous clusters, solved exactly by dynamic programming.
    """
    length, count = len(values), min(count, len(values))
    sums, squares = [0.0], [0.0]
    for value in values:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)

    def deviation(start: int, end: int) -> float:
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    best = [0.0 if end == 0 else deviation(0, end) for end in range(length + 1)]
    cuts: list[list[int]] = []
    for used in range(2, count + 1):
        reached = [float("inf")] * (length + 1)
        chosen = [0] * (length + 1)
        for end in range(used, length + 1):
            reached[end], chosen[end] = min((best[cut] + deviation(cut, end), cut) for cut in range(used - 1, end))
        best = reached
        cuts.append(chosen)
    bounds = [length]
    for chosen in reversed(cuts):
        bounds.append(chosen[bounds[-1]])
    starts = sorted(bounds[1:])
    return [sum(place >= start for start in starts) for place in range(length)]
