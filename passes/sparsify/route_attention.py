"""Let tokens attend inside of clusters of equal size, and some heads to their neighbours alone (Routing Transformer).

    centroids mu: k-means of layer-normed queries and keys;    w = T / C
    cluster c: the w queries and the w keys with the largest products with mu_c;    softmax(scale q k^T) v inside of it

Which tokens meet depends on the input; how many is fixed by its length, so that every target runs it.  C clusters
compute 1 / C of the attention; the paper's number is the root of the length.  A token may be in several clusters, of
which it gets the mean, or in none, where it gets nothing: as in the paper, part of the heads therefore attends to a
window, here those that give most of their weight to one on the calibration data, and one as wide as costs the same.

The paper moves its centroids by running averages as it trains; here they are fitted on calibration data, once.  It
makes queries and keys of one projection where queries see no later keys, so that a token meets its own key; here tokens
are then routed by their queries alone, and keep both.  Even so which tokens meet depends on later ones: a model that
predicts them would be judged on what it should not know, so that such attention is left alone unless ``causal`` is set.

**Approximate**.  The Routing Transformer is trained so; in a model trained with full attention this is the control, and
a start for ``recover-accuracy``, during which the centroids stand still.

Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, TACL 2021, arXiv 2003.05997.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.match import arguments, xf
from xformopt.passes.sparsify.localize_attention import widest_window
from xformopt.passes.sparsify.support.candidates import (
    bias_refusal,
    find_attentions,
    length_on,
    longest_of,
    refusal,
)
from xformopt.passes.sparsify.support.centroids import find_centroids, near_mass, routed_vectors
from xformopt.pipeline import Context, Effect, RewritePass
from xformopt.program import Program, path_of, shape_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["RouteAttention"]

aten = torch.ops.aten


@dataclass(frozen=True)
class RouteAttention(RewritePass):
    """Let tokens attend inside of clusters of equal size.

    Attributes:
        clusters: How many, which is also by what part less is computed; None: the root of the longest input (of the
            calibration data, where nothing bounds it).
        local: Share of the heads that attend to a window instead.
        causal: Whether attention takes part in which queries see no later keys.

    """

    clusters: int | None = None
    local: float = 0.5
    causal: bool = False

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Roy et al., Routing Transformer, TACL 2021, arXiv 2003.05997",)

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 2:
            raise ValueError(f"clusters must be at least 2, but is {self.clusters}")
        if not 0 <= self.local < 1:
            raise ValueError(f"local must be at least 0 and below 1, but is {self.local}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the attention."""
        every = set(find_attentions(program))
        nodes = [node for node in program.nodes() if node.name in every]
        if nodes and not context.calibration:
            raise DataError(
                "Clusters of tokens are found on calibration data, and there is none. Give some with --calibration (or "
                "calibration=... in Python)."
            )
        longest = {node.name: _longest(program, node, context) for node in nodes}
        checked = ((node.name, self._refusal(program, node, longest[node.name])) for node in nodes)
        reasons = {name: reason for name, reason in checked if reason is not None}
        able = [node for node in nodes if node.name not in reasons]
        vectors = routed_vectors(program, context.calibration, able) if able else {}
        windows = {node.name: self._window(node, longest[node.name]) for node in able}
        known = {name: window for name, window in windows.items() if window is not None}
        looking = [node for node in able if node.name in known]
        near = near_mass(program, context.calibration, looking, known) if looking else {}

        def route_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            name = node.name
            if name not in every:
                return None
            if name in reasons:
                return Reject(reasons[name])
            clusters = self._clusters(longest[name])
            if clusters > vectors[name].shape[1]:
                return Reject(
                    f"the {vectors[name].shape[1]} vectors of the data are fewer than its {clusters} clusters"
                )
            centroids = find_centroids(vectors[name], clusters, context.seed)
            window = windows[name]
            if window is None:
                return _routed(editor, node, centroids, range(arguments(node)["heads"]))
            count = self._local_heads(node)
            order = near[name].argsort(descending=True).tolist()
            return _divided(editor, node, centroids, sorted(order[:count]), sorted(order[count:]), window)

        return (route_attention,)

    def _refusal(self, program: Program, node: fx.Node, longest: int) -> str | None:
        reason = refusal(program, node) or bias_refusal(program, node)
        if reason is not None:
            return reason
        if arguments(node)["causal"] and not self.causal:
            return "its queries see no later keys, and which keys they meet would depend on later ones"
        clusters = self._clusters(longest)
        if clusters < 2 or clusters > longest // 2:
            return f"its longest input of {longest} tokens makes no {clusters} clusters of at least two"
        return None

    def _clusters(self, longest: int) -> int:
        return self.clusters or round(math.sqrt(longest))

    def _local_heads(self, node: fx.Node) -> int:
        heads = int(arguments(node)["heads"])
        return min(round(self.local * heads), heads - 1)

    def _window(self, node: fx.Node, longest: int) -> int | None:
        """Return the window of the local heads, or None where no head is one."""
        if self._local_heads(node) == 0:
            return None
        return widest_window(longest, 1 / self._clusters(longest), causal=arguments(node)["causal"])


def _longest(program: Program, node: fx.Node, context: Context) -> int:
    """Return the largest number of tokens that an attention can meet or, where nothing bounds it, meets in the data."""
    bound = longest_of(program, node)
    if bound is not None:
        return bound
    return max((length_on(program, node, batch) for batch in context.calibration), default=0)


def _routed(editor: Editor, node: fx.Node, centroids: torch.Tensor, heads: Sequence[int]) -> fx.Node:
    """Insert the routed attention of some heads, ``[B, T, len(heads) * E]``."""
    given = arguments(node)
    q, k, v, bias = _operands(editor, node, heads)
    mu = editor.parameter(f"{path_of(node) or node.name}.centroids", centroids[list(heads)])
    options = {"heads": len(heads), "scale": given["scale"], "causal": given["causal"]}
    return editor.call(xf.routing_attention, q, k, v, mu, given["key_mask"], bias, **options)


def _divided(
    editor: Editor, node: fx.Node, centroids: torch.Tensor, local: Sequence[int], routed: Sequence[int], window: int
) -> fx.Node:
    """Insert the attention of local and routed heads, put back into their order."""
    given = arguments(node)
    q, k, v, bias = _operands(editor, node, local)
    near = editor.call(
        xf.local_attention,
        q,
        k,
        v,
        given["key_mask"],
        bias,
        heads=len(local),
        scale=given["scale"],
        window_left=window,
        window_right=0 if given["causal"] else window,
        causal=given["causal"],
    )
    both = editor.call(aten.cat.default, [near, _routed(editor, node, centroids, routed)], 2)
    order = torch.tensor([*local, *routed]).argsort().tolist()
    return _heads_of(editor, node, both, order, given["heads"])


def _operands(editor: Editor, node: fx.Node, heads: Sequence[int]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
    """Return queries, keys, values and the bias of some heads, one key and value head for each."""
    given = arguments(node)
    count, kv_heads, bias = given["heads"], given["kv_heads"], given["bias"]
    if bias is not None and shape_of(editor.program, bias)[1] != 1 and len(heads) < count:
        index = editor.parameter(f"{path_of(node) or node.name}.heads", torch.tensor(heads))
        bias = editor.call(aten.index_select.default, bias, 1, index)
    serving = [head * kv_heads // count for head in heads]
    q = _heads_of(editor, node, given["q"], heads, count)
    k, v = (_heads_of(editor, node, given[name], serving, kv_heads) for name in ("k", "v"))
    return q, k, v, bias


def _heads_of(editor: Editor, node: fx.Node, value: fx.Node, heads: Sequence[int], count: int) -> fx.Node:
    """Return some of ``count`` heads of ``[B, T, count * N]``, in the order given."""
    if list(heads) == list(range(count)):
        return value
    columns = _columns(tuple(heads), int(shape_of(editor.program, value)[2]) // count)
    index = editor.parameter(f"{path_of(node) or node.name}.columns", columns)
    return editor.call(aten.index_select.default, value, 2, index)


@cache
def _columns(heads: tuple[int, ...], depth: int) -> torch.Tensor:
    """Return the columns of some heads; the same tensor each time, so that a program holds it once."""
    return (torch.tensor(heads)[:, None] * depth + torch.arange(depth)).flatten()
