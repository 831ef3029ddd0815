"""Which attentions can be computed in part, and what their sparse forms are called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, is_call, xf
from xformopt.program import Program, path_of, shape_of
from xformopt.rewrite import Editor

__all__ = ["bias_refusal", "find_attentions", "length_on", "longest_of", "masked_attention", "refusal", "repeat_heads"]

aten = torch.ops.aten
_IN_PART = (
    xf.block_sparse_attention,
    xf.combiner_attention,
    xf.local_attention,
    xf.mra_attention,
    xf.prob_sparse_attention,
    xf.routing_attention,
)


def find_attentions(program: Program) -> list[str]:
    """Return the names of all attentions in execution order; none where all are computed in part already.

    Raises:
        PassError: there is no attention.

    """
    found = [node.name for node in program.nodes() if is_call(node, xf.attention)]
    if not found and not any(is_call(node, *_IN_PART) for node in program.nodes()):
        raise PassError(
            f"The program {program.name!r} has no attention to compute in part. Looked for xf.attention; its operators "
            f"are others, or were fused by a pass that belongs after this one."
        )
    return found


def refusal(program: Program, node: fx.Node) -> str | None:
    """Return why no sparse form can stand for an attention, or None where one may."""
    given = arguments(node)
    if shape_of(program, given["q"])[1] != shape_of(program, given["k"])[1]:
        return "queries and keys differ in number, so that there are no blocks of both"
    if given["window_left"] >= 0 or given["window_right"] >= 0:
        return "it has a window already"
    if given["key_log_size"] is not None:
        return "its keys stand for several tokens each"
    return None


def bias_refusal(program: Program, node: fx.Node) -> str | None:
    """Return why the bias of an attention cannot be cut into blocks, or None where it can or there is none."""
    bias = arguments(node)["bias"]
    if bias is None:
        return None
    shape, length = shape_of(program, bias), shape_of(program, node)[1]
    is_over_pairs = len(shape) == 4 and shape[2:] == (length, length)
    return None if is_over_pairs else "its bias is not over all pairs of queries and keys"


def longest_of(program: Program, node: fx.Node) -> int | None:
    """Return the largest number of tokens an attention can meet, or None where nothing bounds it."""
    length: Any = shape_of(program, arguments(node)["q"])[1]
    if isinstance(length, int):
        return length
    highs: dict[str, int] = {}
    for symbol in length.free_symbols:
        high = program.dims[str(symbol)].high
        if high is None:
            return None
        highs[str(symbol)] = high
    return program.dims.evaluate(length, highs)


def length_on(program: Program, node: fx.Node, batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many queries an attention has on a batch."""
    return program.dims.evaluate(shape_of(program, node)[1], program.bind(batch))


def repeat_heads(editor: Editor, value: fx.Node, kv_heads: int, heads: int) -> fx.Node:
    """Return keys or values ``[B, S, kv_heads * D]`` with one head for each of the query heads."""
    if kv_heads == heads:
        return value
    depth = int(shape_of(editor.program, value)[2]) // kv_heads
    apart = editor.call(aten.unflatten.int, value, 2, [kv_heads, depth])
    column = editor.call(aten.unsqueeze.default, apart, 3)  # [B, S, kv_heads, 1, D]
    beside = editor.call(aten.cat.default, [column] * (heads // kv_heads), 3)
    return editor.call(aten.flatten.using_ints, beside, 2, 4)


def masked_attention(editor: Editor, node: fx.Node, mask: torch.Tensor, block: int) -> fx.Node:
    """Insert what stands for an attention over the blocks of a mask, ``[H, N, N]`` bool."""
    given = arguments(node)
    return editor.call(
        xf.block_sparse_attention,
        given["q"],
        repeat_heads(editor, given["k"], given["kv_heads"], given["heads"]),
        repeat_heads(editor, given["v"], given["kv_heads"], given["heads"]),
        editor.parameter(f"{path_of(node) or node.name}.block_mask", mask),
        given["key_mask"],
        given["bias"],
        heads=given["heads"],
        scale=given["scale"],
        block=block,
        causal=given["causal"],
    )
