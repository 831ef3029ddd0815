"""Shorten the stream of tokens of a program, layer by layer, and let what follows work on fewer tokens.

A *flow* walks a copy of the program once.  Behind each layer that its plan names it asks a :class:`Reducer` for the
shorter stream; what works on each token alone is inferred anew, attention gets the sizes and the mask of the tokens
that are left, and what needs the tokens by place or in full gets what the reducer has for it, or is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.passes.tokens.support.token_stream import TokenLayer, TokenStream, find_stream
from xformopt.passes.tokenwise import RefusalError, is_tokenwise
from xformopt.program import Program, infer_value, path_of, value_of
from xformopt.program.text import target_name
from xformopt.rewrite import Editor

__all__ = ["Flow", "Reducer", "shorten"]

aten = torch.ops.aten

# the logarithm of a size stays finite; what has no size at all is masked
_SMALLEST_SIZE = 1e-6


@dataclass
class Flow:
    """A program whose stream is being shortened.

    Attributes:
        program: The copy that is changed.
        stream: What was found in it.
        sizes: How many tokens each one stands for, ``[B, T]``; None: 1 each, none of them padding.
        steps: What a reducer needs to restore the tokens, one entry for each shortening.

    """

    program: Program
    stream: TokenStream
    editor: Editor
    sizes: fx.Node | None = None
    steps: list[Any] = field(default_factory=list)
    _depth: dict[fx.Node, int] = field(default_factory=dict)
    _seen: dict[tuple[int, str], fx.Node] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **options: Any) -> fx.Node:
        """Insert an operator at the current place."""
        return self.editor.call(target, *args, **options)

    def once(self, label: str, target: Any, *args: Any, **options: Any) -> fx.Node:
        """The same, once for each length of the stream."""
        key = (len(self.steps), label)
        if key not in self._seen:
            self._seen[key] = self.call(target, *args, **options)
        return self._seen[key]

    def log_size(self) -> fx.Node | None:
        """Return the logarithm of the sizes, or None where all are 1."""
        if self.sizes is None:
            return None
        positive = self.once("positive", aten.clamp_min.default, self.sizes, _SMALLEST_SIZE)
        return self.once("log", aten.log.default, positive)

    def mask(self) -> fx.Node | None:
        """Return which tokens are not padding, or None where all are not."""
        if self.stream.mask is None or not self.steps:
            return self.stream.mask
        assert self.sizes is not None
        return self.once("mask", aten.gt.Scalar, self.sizes, 0)

    def first_sizes(self, value: fx.Node) -> fx.Node | None:
        """Return the sizes of the tokens before anything is done: 0 for padding, or None where there is none."""
        if self.stream.mask is None:
            return None
        return self.call(aten._to_copy.default, self.stream.mask, dtype=value_of(value).dtype)


class Reducer(ABC):
    """One way to make tokens fewer."""

    # whether tokens grow, so that attention must know their sizes
    grows: bool = False

    @abstractmethod
    def shorten(self, flow: Flow, layer: TokenLayer, r: int) -> fx.Node:
        """Insert what makes the stream behind ``layer`` shorter by ``r`` tokens; return it, and record the step."""

    @abstractmethod
    def read_all(self, flow: Flow, node: fx.Node, value: fx.Node, depth: int) -> fx.Node | None:
        """Return what ``node`` is to read for ``value``, whose tokens were shortened ``depth`` times: the same tokens
        as before the first of them; or None where ``node`` is adapted to fewer tokens.

        Raises:
            RefusalError: there is no such thing.

        """


def shorten(program: Program, plan: Mapping[int, int], reducer: Reducer, prefix: int | None = None) -> Program:
    """Return a copy of a plain program with fewer tokens behind the layers named in ``plan``.

    Raises:
        RefusalError: it has no stream of tokens, or something behind it needs what is no longer there.

    """
    copy = program.copy()
    stream = find_stream(copy)
    if prefix is not None:
        stream = TokenStream(stream.layers, stream.length, prefix, stream.mask)
    flow = Flow(copy, stream, Editor(copy))
    places = {layer.stream: (index, layer) for index, layer in enumerate(stream.layers)}
    for node in list(copy.nodes()):
        _carry(flow, reducer, node)
        if node in places and plan.get(places[node][0]):
            index, layer = places[node]
            _shorten_behind(flow, reducer, layer, plan[index])
    _carry_outputs(flow, reducer)
    return copy.drop_unused()


def _shorten_behind(flow: Flow, reducer: Reducer, layer: TokenLayer, r: int) -> None:
    value = layer.stream
    created_before = set(flow.program.graph.nodes)
    flow.editor.at(value.next)
    shorter = reducer.shorten(flow, layer, r)
    created = [node for node in flow.program.graph.nodes if node not in created_before]
    for node in created:
        node.meta["path"] = path_of(value)
    reading = [user for user in value.users if user.op != "output" and user not in created]
    for user in reading:
        user.replace_input_with(value, shorter)
    flow._depth[shorter] = len(flow.steps)


def _carry(flow: Flow, reducer: Reducer, node: fx.Node) -> None:
    """Adapt one operator to the tokens that are left."""
    held = [a for a in node.all_input_nodes if a in flow._depth]
    if not held:
        return
    depth = flow._depth[held[0]]
    flow.editor.at(node)
    if is_call(node, xf.attention):
        _carry_attention(flow, reducer, node)
    elif not is_tokenwise(node, held):
        if _reads_prefix(flow, node):
            node.meta["val"] = infer_value(flow.program, node)
            return
        _read_all(flow, reducer, node, held)
        return
    node.meta["val"] = infer_value(flow.program, node)
    flow._depth[node] = depth


def _carry_attention(flow: Flow, reducer: Reducer, node: fx.Node) -> None:
    given = arguments(node)
    log_size = flow.log_size() if reducer.grows else None
    node.args = (given["q"], given["k"], given["v"], flow.mask(), None, log_size)
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("key_mask", "bias")}


def _reads_prefix(flow: Flow, node: fx.Node) -> bool:
    """Whether an operator takes only tokens that never leave."""
    given = arguments(node)
    if not is_call(node, aten.select.int, aten.slice.Tensor) or given["dim"] not in (1, -2):
        return False
    if node.target is aten.select.int:
        start, end = given["index"], given["index"] + 1
    else:
        start, end = given["start"] or 0, given["end"]
    is_known = isinstance(start, int) and isinstance(end, int)
    return is_known and bool(0 <= start <= end <= flow.stream.prefix)


def _read_all(flow: Flow, reducer: Reducer, node: fx.Node, held: list[fx.Node]) -> None:
    for value in held:
        whole = reducer.read_all(flow, node, value, flow._depth[value])
        if whole is None:
            continue
        if (later := _attention_behind(node)) is not None:
            where = path_of(later) or later.name
            raise RefusalError(node, f"{target_name(node.target)} needs all tokens, in front of attention at {where}")
        node.replace_input_with(value, whole)


def _attention_behind(node: fx.Node) -> fx.Node | None:
    pending: list[fx.Node] = [node]
    seen: set[fx.Node] = set()
    while pending:
        current = pending.pop()
        if is_call(current, xf.attention):
            return current
        pending += [user for user in current.users if user not in seen]
        seen.update(current.users)
    return None


def _carry_outputs(flow: Flow, reducer: Reducer) -> None:
    """Return every token of what the program returns."""
    output = flow.program.output_node
    flow.editor.at(output)
    for value in dict.fromkeys(output.all_input_nodes):
        if value in flow._depth:
            whole = reducer.read_all(flow, output, value, flow._depth[value])
            assert whole is not None
            output.replace_input_with(value, whole)
