"""Find the stream of tokens in a program: one sequence, of one length, that layers of attention read and add to.

A *layer* is one attention, or several side by side, and what follows up to the next.  Tokens may leave where the whole
state of the network is one value ``[B, T, C]``: behind the residual sum after attention, or behind its norm where the
norm is part of the stream (Vaswani et al.'s order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.masks import mark_the_same
from xformopt.passes.tokenwise import NORMS, RefusalError, is_tokenwise, tokens_of, xf_name
from xformopt.program import Program, shape_of
from xformopt.program.dims import Size
from xformopt.program.text import target_name
from xformopt.rewrite import Editor

__all__ = ["TokenLayer", "TokenStream", "find_stream", "plain"]

aten = torch.ops.aten

_SHORTENING = frozenset({"match_tokens", "rank_tokens", "transform_tokens"})
_APART: dict[object, Any] = {xf.add_layer_norm: xf.layer_norm, xf.add_rms_norm: xf.rms_norm}


@dataclass(frozen=True)
class TokenLayer:
    """One layer: its attentions, and the value ``[B, T, C]`` behind them where tokens may leave."""

    attentions: tuple[fx.Node, ...]
    stream: fx.Node


@dataclass(frozen=True)
class TokenStream:
    """The layers of an encoder, first to last.

    Attributes:
        layers: See :class:`TokenLayer`.
        length: Tokens in the sequence: a number, or an expression in dimension names.
        prefix: Tokens at the front that have a meaning by their place (class and distillation token).
        mask: Which tokens are not padding, bool ``[B, T]``; None: all.

    """

    layers: tuple[TokenLayer, ...]
    length: Size
    prefix: int
    mask: fx.Node | None


def plain(program: Program) -> Program:
    """Return a copy in which residual sums stand alone: apart from norms, and each of two values."""
    copy = program.copy()
    editor = Editor(copy)
    for node in list(copy.nodes()):
        if node.target in _APART:
            _separate(editor.at(node), node)
        elif is_call(node, aten.sum.dim_IntList) and is_call(node.args[0], aten.stack.default):
            _unstack(editor.at(node), node)
    return copy.drop_unused()


def _separate(editor: Editor, node: fx.Node) -> None:
    x, residual, *affine = node.args
    total = editor.call(aten.add.Tensor, x, residual)
    norm = editor.call(_APART[node.target], total, *affine, eps=node.kwargs["eps"])
    for part in list(node.users):
        part.replace_all_uses_with((norm, total)[int(str(part.args[1]))])
        editor.program.graph.erase_node(part)
    editor.program.graph.erase_node(node)


def _unstack(editor: Editor, node: fx.Node) -> None:
    """Write a sum over branches that were stacked as what it is."""
    stacked = arguments(operand(node))
    if stacked["dim"] == 0 and arguments(node)["dim"] == [0] and not arguments(node)["keepdim"]:
        node.replace_all_uses_with(reduce(lambda x, y: editor.call(aten.add.Tensor, x, y), stacked["tensors"]))


def find_stream(program: Program) -> TokenStream:
    """Return the stream of tokens of a plain program.

    Raises:
        RefusalError: what was looked for is not there.

    """
    if found := [node for node in program.nodes() if xf_name(node) in _SHORTENING]:
        raise RefusalError(found[0], f"its tokens are already fewer: there is xf.{xf_name(found[0])}")
    attentions = [node for node in program.nodes() if is_call(node, xf.attention)]
    if not attentions:
        raise RefusalError(None, "there is no xf.attention, and so nothing that says how tokens relate")
    length = shape_of(program, arguments(attentions[0])["q"])[1]
    masks = [_check_attention(program, node, length) for node in attentions]
    for node, mask in zip(attentions, masks, strict=True):
        if not _agree(program, mask, masks[0]):
            raise RefusalError(node, "its mask of padding is not that of the first attention")
    layers = _layers(program, attentions, length)
    return TokenStream(layers, length, _prefix(program, layers, length), masks[0])


def _agree(program: Program, one: fx.Node | None, other: fx.Node | None) -> bool:
    return one is other or (one is not None and other is not None and mark_the_same(program, one, other))


def _check_attention(program: Program, node: fx.Node, length: Size) -> fx.Node | None:
    """Refuse attention that is not over one sequence as a whole; return its mask of padding."""
    given = arguments(node)
    if given["causal"]:
        raise RefusalError(node, "it is causal: a merged token would see what comes after some of its parts")
    if given["window_left"] >= 0 or given["window_right"] >= 0:
        raise RefusalError(node, "it looks through a window of positions, which shorter sequences do not have")
    if given["bias"] is not None:
        raise RefusalError(node, "its logits have a bias for pairs of positions, which merged tokens do not have")
    if given["key_log_size"] is not None:
        raise RefusalError(node, "its tokens already have sizes")
    queries, keys = (shape_of(program, given[name])[1] for name in ("q", "k"))
    if queries != keys:
        raise RefusalError(node, f"{queries} queries look at {keys} keys of another sequence")
    if queries != length:
        raise RefusalError(node, f"it has {queries} tokens, and the first attention {length}: a pyramid or windows")
    mask: fx.Node | None = given["key_mask"]
    return mask


def _layers(program: Program, attentions: Sequence[fx.Node], length: Size) -> tuple[TokenLayer, ...]:
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    last_read = {
        node: max((order[user] for user in node.users if user.op != "output"), default=-1)
        for node in program.graph.nodes
    }
    layers: list[TokenLayer] = []
    waiting: list[fx.Node] = []
    for node in program.nodes():
        if is_call(node, xf.attention):
            waiting.append(node)
        elif waiting and _is_cut(program, node, order, last_read):
            _check_between(waiting, node, order)
            if tokens_of(program, node) != length:
                shape = list(shape_of(program, node))
                raise RefusalError(
                    node, f"behind attention over {length} tokens the stream is {shape}: windows or a pyramid"
                )
            layers.append(TokenLayer(tuple(waiting), _behind_norm(program, node, order, last_read)))
            waiting = []
    if waiting and not layers:
        raise RefusalError(waiting[0], "behind it there is no place where one value [batch, tokens, channels] is all")
    if len(waiting) > 1 or len(layers) == 0:
        raise RefusalError(waiting[0], "its layers are not in a row: values of several of them are alive side by side")
    return tuple(layers)


def _is_cut(program: Program, node: fx.Node, order: dict[fx.Node, int], last_read: dict[fx.Node, int]) -> bool:
    """Whether ``node`` is all of the sequence that anything after it reads."""
    if tokens_of(program, node) is None:
        return False
    place = order[node]
    alive = (n for n in program.graph.nodes if order[n] < place < last_read[n] and n.op != "get_attr")
    return not any(_holds_tokens(n) for n in alive)


def _holds_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return any(
        isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 2 and v.shape[1] != 1 for v in values
    )


def _behind_norm(program: Program, node: fx.Node, order: dict[fx.Node, int], last_read: dict[fx.Node, int]) -> fx.Node:
    """Return the norm that alone reads ``node``, where it is the stream itself; else ``node``."""
    users = [user for user in node.users if user.op != "output"]
    if len(users) == 1 and xf_name(users[0]) in NORMS and _is_cut(program, users[0], order, last_read):
        return users[0]
    return node


def _check_between(attentions: Sequence[fx.Node], stream: fx.Node, order: dict[fx.Node, int]) -> None:
    """Refuse anything between attention and the stream that moves tokens."""
    first = min(order[node] for node in attentions)
    behind = set(attentions)
    for node in sorted(order, key=order.__getitem__):
        if not first < order[node] <= order[stream] or node in behind or node.op != "call_function":
            continue
        read = [a for a in node.all_input_nodes if a in behind]
        if not read:
            continue
        holding = [a for a in node.all_input_nodes if a in behind or (_holds_tokens(a) and a.op != "get_attr")]
        if not is_tokenwise(node, holding):
            raise RefusalError(node, f"behind attention, {target_name(node.target)} does not keep to tokens")
        behind.add(node)


def _prefix(program: Program, layers: Sequence[TokenLayer], length: Size) -> int:
    """Count the tokens at the front that are parameters, or that are read by their place at the end."""
    first, last = layers[0].attentions[0], layers[-1].attentions[-1]
    found = 0
    for node in program.nodes():
        if node < first and is_call(node, aten.cat.default) and tokens_of(program, node) == length:
            found = max(found, _leading_parameters(program, node))
        if node > last and is_call(node, aten.select.int) and tokens_of(program, node.args[0]) == length:  # type: ignore[arg-type]
            given = arguments(node)
            if given["dim"] in (1, -2) and given["index"] >= 0:
                found = max(found, given["index"] + 1)
    return found


def _leading_parameters(program: Program, node: fx.Node) -> int:
    given, count = arguments(node), 0
    if given["dim"] not in (1, -2):
        return 0
    for part in given["tensors"]:
        size = tokens_of(program, part)
        if not isinstance(size, int) or not _is_stored(part):
            break
        count += size
    return count


def _is_stored(node: fx.Node) -> bool:
    """Whether a value is a parameter, repeated for the batch or not."""
    while is_call(node, aten.expand.default, aten.repeat.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr"
