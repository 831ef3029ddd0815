"""Which values of a program can be computed on packed tokens, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.passes.masks import PaddingMask, mark_the_same, padding_behind
from xformopt.passes.tokenwise import RefusalError, is_layer, is_tokenwise, xf_name
from xformopt.program import Program, shape_of
from xformopt.program.text import target_name

__all__ = ["PackedRegion", "find_region"]

aten = torch.ops.aten


@dataclass(frozen=True)
class PackedRegion:
    """What is computed on packed tokens.

    Attributes:
        mask: Which tokens are not padding, bool ``[B, T]``.
        front: Positions at the front that are read by their place.
        attentions: The attentions among ``values``.
        values: In execution order, each with those of its operands that hold tokens.
        reads: Values that something else reads, with their readers in execution order.

    """

    mask: fx.Node
    front: int
    attentions: tuple[fx.Node, ...]
    values: dict[fx.Node, set[fx.Node]]
    reads: dict[fx.Node, list[fx.Node]]


def find_region(program: Program) -> PackedRegion:
    """Return what can be packed.

    Raises:
        RefusalError: the masks are not of padding, or something needs tokens that would not be computed.

    """
    attentions = tuple(node for node in program.nodes() if is_call(node, xf.attention))
    mask = _shared_mask(program, attentions)
    padding = padding_behind(program, mask)
    if isinstance(padding, str):
        raise RefusalError(attentions[0], f"its mask is not of padding: {padding}")
    values, behind = _values(program, mask)
    reads: dict[fx.Node, list[fx.Node]] = {}
    front = 0
    for value in behind:
        if readers := sorted(user for user in value.users if user not in values):
            front = max(front, *(_places_read(program, value, reader, padding) for reader in readers))
            reads[value] = readers
    if front and any(arguments(node)["causal"] for node in attentions):
        raise RefusalError(attentions[0], "it is causal, and tokens are read by their place, which may be padding")
    return PackedRegion(mask, front, attentions, values, reads)


def _shared_mask(program: Program, attentions: tuple[fx.Node, ...]) -> fx.Node:
    """Return the key mask of all attentions; refuse those that are more than attention inside a masked sequence."""
    if not attentions:
        raise RefusalError(None, "there is no xf.attention, and so nothing that says how tokens relate")
    for node in attentions:
        given = arguments(node)
        if given["key_mask"] is None:
            raise RefusalError(node, "it has no key mask: nothing says which tokens are padding")
        if not mark_the_same(program, given["key_mask"], arguments(attentions[0])["key_mask"]):
            raise RefusalError(node, "its key mask is not that of the first attention")
        if given["bias"] is not None:
            raise RefusalError(node, "its logits have a bias for pairs of positions, which packed tokens do not have")
        if given["window_left"] >= 0 or given["window_right"] >= 0:
            raise RefusalError(node, "it looks through a window of positions, which gaps in the mask would shift")
        if given["key_log_size"] is not None:
            raise RefusalError(node, "its tokens have sizes: they were merged")
        sequences = {shape_of(program, given[name])[:2] for name in ("q", "k", "v", "key_mask")}
        if len(sequences) > 1:
            raise RefusalError(node, "its queries look at keys of another sequence")
    mask: fx.Node = arguments(attentions[0])["key_mask"]
    return mask


def _values(program: Program, mask: fx.Node) -> tuple[dict[fx.Node, set[fx.Node]], list[fx.Node]]:
    """Return what can be packed, with the operands that hold tokens, and which of it lies behind attention."""
    B, T = shape_of(program, mask)
    values: dict[fx.Node, set[fx.Node]] = {}
    behind: dict[fx.Node, None] = {}
    for node in program.nodes():
        held = {a for a in node.all_input_nodes if a in values or _holds_tokens(program, a, (B, 1), T)}
        is_stream = any(a in values or _holds_tokens(program, a, (B,), T) for a in held)
        is_attention = is_call(node, xf.attention)
        if not is_stream or not (is_attention or _is_packable(node, held)):
            continue
        if is_attention or is_layer(node, held) or held & values.keys():
            values[node] = held
            if is_attention or held & behind.keys():
                behind[node] = None
    return values, list(behind)


def _holds_tokens(program: Program, node: fx.Node, batches: tuple[object, ...], length: object) -> bool:
    """Whether a value is ``[B, T, C]``, of a batch out of ``batches``."""
    value = node.meta.get("val")
    if node.op == "output" or not isinstance(value, torch.Tensor) or value.dim() != 3:
        return False
    shape = shape_of(program, node)
    return shape[0] in batches and shape[1] == length


def _is_packable(node: fx.Node, held: set[fx.Node]) -> bool:
    """Whether a value is computed token by token, from nothing else that differs between sequences."""
    others = [a for a in node.all_input_nodes if a not in held]
    if is_call(node, xf.rope):
        return not others
    if not is_tokenwise(node, held) or _quantizes_all_together(node):
        return False
    known = [a.meta["val"] for a in others]
    return all(isinstance(value, torch.Tensor) and (value.dim() < 3 or value.shape[0] == 1) for value in known)


def _quantizes_all_together(node: fx.Node) -> bool:
    return xf_name(node) == "quantized_linear" and arguments(node)["x_scale"] is None


def _places_read(program: Program, value: fx.Node, reader: fx.Node, padding: PaddingMask) -> int:
    """Return how many positions at the front a reader needs whatever the mask says.

    Raises:
        RefusalError: it needs positions that would not be computed.

    """
    if reader.op == "output":
        _check_returned(program, value, padding)
        return 0
    given = arguments(reader)
    if is_call(reader, aten.sym_size.int):
        return 0
    if (
        is_call(reader, xf.mean_pool)
        and given["mask"] is not value
        and padding_behind(program, given["mask"]) == padding
    ):
        return 0
    if is_call(reader, aten.select.int) and given["dim"] in (1, -2) and given["index"] >= 0:
        return int(given["index"]) + 1
    if is_call(reader, aten.slice.Tensor) and given["dim"] in (1, -2):
        start, end = given["start"] or 0, given["end"]
        if isinstance(start, int) and isinstance(end, int) and 0 <= start <= end < torch.iinfo(torch.int64).max:
            return int(end)
    what = target_name(reader.target)
    if _quantizes_all_together(reader):
        raise RefusalError(
            reader, f"{what} takes the range of all tokens, those of padding too; pack before quantizing"
        )
    raise RefusalError(reader, f"{what} reads tokens of padding, or is not known to do without them")


def _check_returned(program: Program, value: fx.Node, padding: PaddingMask) -> None:
    for spec, result in zip(program.outputs, program.results, strict=True):
        if result is value and (spec.mask, spec.mask_means) != padding:
            raise RefusalError(
                value,
                f"the program returns {spec.name} for every position, and does not say that {padding[0]} tells which "
                f"of them count",
            )
