"""What attention looks at on calibration data, by blocks of queries and keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from xformopt.errors import DataError
from xformopt.kernels.attention.reference import attention_weights
from xformopt.match import arguments
from xformopt.passes.samples import check_finite
from xformopt.program import Program, interpret, path_of

__all__ = ["BlockMap", "collect_maps", "in_blocks", "weights_of"]

_OPTIONS = ("heads", "kv_heads", "scale", "causal", "window_left", "window_right")


@dataclass
class BlockMap:
    """The mean attention of one layer.

    Attributes:
        mass: What the queries of each block gave to the keys of each, summed, ``[H, N, N]`` float64.
        queries: How many queries that was, ``[N, N]`` float64: those in a sequence in which the block of keys exists.
        causal: Whether queries see no later keys.

    """

    mass: torch.Tensor
    queries: torch.Tensor
    causal: bool

    @property
    def mean(self) -> torch.Tensor:
        """What a query of one block gives to the keys of another, ``[H, N, N]``; 0 where the two never met."""
        return self.mass / self.queries.clamp(min=1)

    @property
    def visible(self) -> torch.Tensor:
        """Which blocks meet by position, ``[N, N]`` bool."""
        every = torch.ones(self.queries.shape, dtype=torch.bool)
        return every.tril() if self.causal else every


def collect_maps(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    names: Iterable[str],
    *,
    block: int,
    capture: int | None = None,
) -> dict[str, BlockMap]:
    """Run ``program`` on calibration batches and return the mean attention of the attentions in ``names``.

    Queries that the key mask hides are padding and do not count.

    Args:
        program: A lifted program.
        batches: Calibration data.
        names: Names of ``xf.attention`` nodes over as many queries as keys.
        block: Tokens of a block.
        capture: How many tokens of a sequence are looked at; None: all.

    Raises:
        DataError: there are no batches, their sequences are shorter than a block, or values are not finite.

    """
    if not batches:
        raise DataError(
            "Which pairs of tokens matter is found on calibration data, and there is none. Give some with "
            "--calibration (or calibration=... in Python)."
        )
    wanted = frozenset(names)
    maps: dict[str, BlockMap] = {}
    for batch in batches:
        values: dict[fx.Node, Any] = {}
        kept = {a for node in program.nodes() if node.name in wanted for a in node.all_input_nodes}

        def observe(node: fx.Node, value: Any, values: dict[fx.Node, Any] = values, kept: set[fx.Node] = kept) -> None:
            if node in kept:
                values[node] = value
            if node.name in wanted:
                found = _map_of(node, values, block, capture)
                maps[node.name] = _sum(maps[node.name], found) if node.name in maps else found

        interpret(program, batch, observe=observe)
    longest = max((len(found.queries) for found in maps.values()), default=0)
    if longest < 2:
        raise DataError(
            f"The calibration data is too short to tell blocks apart: its sequences, or the {capture or 'tokens'} "
            f"looked at, fit into one block of {block}. Give longer sequences, or choose a smaller block."
        )
    return maps


def weights_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> torch.Tensor:
    """Return the weights of an attention ``[B, H, T, S]``, of the values it reads."""
    given = arguments(node)
    operands = [values.get(given[name]) for name in ("q", "k", "key_mask", "bias", "key_log_size")]
    weights = attention_weights(*operands, **{name: given[name] for name in _OPTIONS})  # type: ignore[arg-type]
    check_finite(weights, path_of(node) or node.name)
    return weights


def in_blocks(pairs: torch.Tensor, block: int) -> torch.Tensor:
    """Sum ``[B, H, T, T]`` up by blocks, ``[B, H, N, N]``."""
    missing = -pairs.shape[2] % block
    padded = functional.pad(pairs, (0, missing, 0, missing))
    summed: torch.Tensor = padded.unflatten(3, (-1, block)).sum(4).unflatten(2, (-1, block)).sum(3)
    return summed


def _map_of(node: fx.Node, values: Mapping[fx.Node, Any], block: int, capture: int | None) -> BlockMap:
    given = arguments(node)
    weights = weights_of(node, values)
    key_mask = values.get(given["key_mask"])
    exists = key_mask if key_mask is not None else torch.ones(len(weights), weights.shape[3])
    weights = weights[:, :, :capture, :capture].double()
    exists = exists[:, :capture].double()
    mass = in_blocks(weights * exists[:, None, :, None], block).sum(0)
    counted = functional.pad(exists, (0, -exists.shape[1] % block)).unflatten(1, (-1, block))  # [B, N, block]
    queries = torch.einsum("bn,bm->nm", counted.sum(2), counted.amax(2))
    return BlockMap(mass, queries, given["causal"])


def _sum(one: BlockMap, other: BlockMap) -> BlockMap:
    """Add two maps, the smaller one at the upper left of the larger."""
    size = max(len(one.queries), len(other.queries))

    def grown(x: torch.Tensor) -> torch.Tensor:
        more = size - x.shape[-1]
        return functional.pad(x, (0, more, 0, more))

    return BlockMap(grown(one.mass) + grown(other.mass), grown(one.queries) + grown(other.queries), one.causal)
