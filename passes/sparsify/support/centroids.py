"""Centroids of the queries and keys of attention on calibration data, and which heads look near themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xformopt.kernels.routing_attention import route
from xformopt.match import arguments
from xformopt.passes.samples import check_finite, sample_rows
from xformopt.passes.sparsify.support.attention_maps import weights_of
from xformopt.program import Program, interpret, path_of

__all__ = ["find_centroids", "fit_centroids", "near_mass", "routed_vectors"]

# of each attention, queries and keys that centroids are fitted to
_ROWS = 1024
_STEPS = 50


def routed_vectors(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], nodes: Sequence[fx.Node]
) -> dict[str, torch.Tensor]:
    """Run ``program`` on calibration batches and return, by attention, vectors as centroids compare them.

    Queries and, where they see later keys, keys: ``[H, N, D]`` float64.

    Raises:
        DataError: values are not finite.

    """
    read = {name: [arguments(node)[name].name for node in nodes] for name in ("q", "k")}
    rows = sample_rows(program, batches, {*read["q"], *read["k"]}, rows=_ROWS)
    return {
        node.name: _vectors(arguments(node), rows[q].double(), rows[k].double())
        for node, q, k in zip(nodes, read["q"], read["k"], strict=True)
    }


def _vectors(given: Mapping[str, Any], queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    heads, kv_heads = given["heads"], given["kv_heads"]
    parts = [route(queries.unflatten(-1, (heads, -1))).transpose(0, 1)]
    if not given["causal"]:
        each = route(keys.unflatten(-1, (kv_heads, -1))).transpose(0, 1)
        parts.append(each.repeat_interleave(heads // kv_heads, 0))
    return torch.cat(parts, 1)


def find_centroids(vectors: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """Fit the centroids of every head to ``[H, N, D]``; returns ``[H, clusters, D]`` float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([fit_centroids(head, clusters, generator) for head in vectors]).float()


def fit_centroids(vectors: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Fit centroids to ``[N, D]`` by k-means, ``[clusters, D]``: where the paper's moving averages come to rest.

    A vector belongs to the centroid with which its product is largest, which is the nearest, as all are of one length.
    A centroid that no vector belongs to moves to the one that is farthest from its own.
    """
    size = vectors.norm(dim=-1).mean()
    found = _spread(vectors, clusters, generator)
    owners = torch.full((len(vectors),), -1)
    for _ in range(_STEPS):
        best, nearest = (vectors @ found.t()).max(1)
        if torch.equal(nearest, owners):
            break
        owners = nearest
        members = torch.nn.functional.one_hot(owners, clusters).to(vectors.dtype)  # [N, C]
        empty = members.sum(0) == 0
        found = torch.nn.functional.normalize(members.t() @ vectors, dim=-1) * size
        found[empty] = vectors[best.argsort()[: int(empty.sum())]]
    return found


def _spread(vectors: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the first centroids far from each other: each by its squared distance to the nearest so far (k-means++)."""
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    apart = torch.full((len(vectors),), float("inf"), dtype=vectors.dtype)
    while len(chosen) < clusters:
        apart = torch.minimum(apart, (vectors - vectors[chosen[-1]]).square().sum(-1))
        apart[chosen] = 0
        # equal vectors: any that is left
        odds = apart if bool((apart > 0).any()) else torch.ones_like(apart).index_fill(0, torch.tensor(chosen), 0.0)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
    return vectors[chosen]


def near_mass(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], nodes: Sequence[fx.Node], window: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return, by attention, the share of its weight that each head gives to keys within a window, ``[H]``."""
    wanted = {node.name for node in nodes}
    read = {operand for node in nodes for operand in node.all_input_nodes}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    for batch in batches:
        values: dict[fx.Node, Any] = {}

        def observe(node: fx.Node, value: Any, values: dict[fx.Node, Any] = values) -> None:
            if node in read:
                values[node] = value
            if node.name in wanted:
                found[node.name].append(_near(node, values, window[node.name]))

        interpret(program, batch, observe=observe)
    return {name: torch.stack(parts).mean(0) for name, parts in found.items()}


def _near(node: fx.Node, values: Mapping[fx.Node, Any], window: int) -> torch.Tensor:
    weights = weights_of(node, values)  # [B, H, T, T]
    check_finite(weights, path_of(node) or node.name)
    at = torch.arange(weights.shape[-1])
    near = ((at[:, None] - at).abs() <= window) * weights
    mask = values.get(arguments(node)["key_mask"])
    rows = torch.ones(len(weights), len(at)) if mask is None else mask
    return torch.einsum("bhts,bt->h", near.double(), rows.double()) / rows.sum().clamp(min=1)
