"""Cutting a Program into its residual blocks, by the dataflow of the residual stream.

A residual addition adds to a value what layers with weights compute from that value.  Where these additions lie, a
program can be cut: between two of them, all that the rest reads is the stream (and conditions, masks and sizes, which
are passed on as they are).  A block begins with a branch that mixes positions, such as attention, and takes with it
the branches behind it that treat each position alone, such as an MLP: the blocks of BRECQ (Li et al., arXiv
2102.05426).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xformopt.errors import ProgramError
from xformopt.match import is_call, xf
from xformopt.program import Program, path_of

__all__ = ["Block", "cut_at", "cut_blocks", "cut_like", "residual_values"]

aten = torch.ops.aten

_MIXERS = frozenset(
    {
        "xf::attention",
        "xf::block_sparse_attention",
        "xf::combiner_attention",
        "xf::delta_rule",
        "xf::delta_rule_resumed",
        "xf::flow_attention",
        "xf::gated_linear_attention",
        "xf::hamming_attention",
        "xf::linear_attention",
        "xf::local_attention",
        "xf::mra_attention",
        "xf::prob_sparse_attention",
        "xf::retention",
        "xf::routing_attention",
        "xf::rwkv",
        "xf::selective_scan",
        "xf::ssd",
        "xf::toeplitz_attention",
        "xf::windowed_linear_attention",
        "aten::bmm",
        "aten::convolution",
        "aten::matmul",
        # a layer between two transpositions mixes positions
        "aten::permute",
        "aten::transpose",
    }
)


@dataclass(frozen=True)
class Block:
    """A piece of a Program; every operator belongs to exactly one, and reads nothing from later ones.

    Attributes:
        name: The module path of its last residual addition; ``input`` and ``output`` for the ends of the program.
        nodes: Its operators by name, in execution order.
        inputs: Values from outside that they read: results of earlier blocks and inputs of the program.
        outputs: Values that are read outside, or returned.

    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Ancestry:
    """Which operators a value depends on, as bit sets over the operators in execution order."""

    def __init__(self, program: Program) -> None:
        self.nodes = list(program.nodes())
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.above: dict[fx.Node, int] = {}
        for index, node in enumerate(self.nodes):
            found = 1 << index
            for read in node.all_input_nodes:
                found |= self.above.get(read, 0)
            self.above[node] = found
        self.weighted = self._set(node for node in self.nodes if any(map(_is_matrix, node.all_input_nodes)))
        self.mixing = self._set(node for node in self.nodes if _name(node) in _MIXERS)

    def of(self, *nodes: fx.Node) -> int:
        """Return the operators that ``nodes`` depend on, themselves included."""
        found = 0
        for node in nodes:
            found |= self.above.get(node, 0)
        return found

    def members(self, chosen: int) -> Iterator[fx.Node]:
        """Yield the operators in a set, in execution order."""
        return (node for index, node in enumerate(self.nodes) if chosen >> index & 1)

    def between(self, source: fx.Node, result: fx.Node) -> int:
        """Return the operators on the ways from ``source`` to ``result``, ``source`` left out."""
        reached = 1 << self.place[source] if source in self.place else 0
        for node in self.members(self.of(result) & ~self.of(source)):
            if any(
                read is source or reached >> self.place.get(read, len(self.nodes)) & 1 for read in node.all_input_nodes
            ):
                reached |= 1 << self.place[node]
        return reached & ~self.of(source)

    def _set(self, nodes: Iterable[fx.Node]) -> int:
        return sum(1 << self.place[node] for node in nodes)


def cut_blocks(program: Program) -> tuple[Block, ...]:
    """Return the blocks of a lifted program in execution order; one that has no residual stream is one block."""
    ancestry = _Ancestry(program)
    additions = _residual_additions(ancestry)
    pieces: list[tuple[str, int]] = []
    claimed = 0
    if additions:
        claimed = ancestry.of(next(iter(additions.values())))
        pieces.append(("input", claimed))
    for addition in additions:
        unit = ancestry.of(addition, *_parts(addition)) & ~claimed
        claimed |= unit
        name = path_of(addition) or f"%{addition.name}"
        if len(pieces) > 1 and not unit & ancestry.mixing:
            pieces[-1] = (name, pieces[-1][1] | unit)
        else:
            pieces.append((name, unit))
    everything = ancestry.of(*program.results)
    pieces.append(("output", everything & ~claimed))
    return tuple(_block(name, list(ancestry.members(chosen))) for name, chosen in pieces if chosen)


def cut_at(program: Program, cuts: Sequence[tuple[str, Sequence[str]]]) -> tuple[Block, ...]:
    """Cut a program where given values are computed.

    Args:
        program: What to cut.
        cuts: The name of a block and the values it computes, in execution order; what no block computes is the last
            one, ``output``.

    """
    ancestry = _Ancestry(program)
    named = {node.name: node for node in program.graph.nodes}
    pieces: list[tuple[str, int]] = []
    claimed = 0
    for name, values in [*cuts, ("output", [node.name for node in program.results])]:
        unit = ancestry.of(*(named[value] for value in values)) & ~claimed
        claimed |= unit
        pieces.append((name, unit))
    return tuple(_block(name, list(ancestry.members(chosen))) for name, chosen in pieces if chosen)


def cut_like(program: Program, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Cut a changed form of a program where ``blocks`` cut the original.

    Args:
        program: Computes the outputs of all blocks under the same names, in whatever way.
        blocks: Of the original.

    Raises:
        ProgramError: a value between blocks is gone.

    """
    ancestry = _Ancestry(program)
    named = {node.name: node for node in program.graph.nodes}
    found: list[Block] = []
    claimed = 0
    for block in blocks:
        if lost := [name for name in block.outputs if name not in named]:
            raise ProgramError(
                f"The changed program has no value %{lost[0]}, which block {block.name} of the original hands on: its "
                f"blocks cannot be compared one by one."
            )
        unit = ancestry.of(*(named[name] for name in block.outputs)) & ~claimed
        claimed |= unit
        piece = _block(block.name, list(ancestry.members(unit)))
        # a value that is compared counts as read, wherever its readers are
        found.append(replace(piece, outputs=tuple(dict.fromkeys((*block.outputs, *piece.outputs)))))
    return tuple(found)


def residual_values(program: Program) -> tuple[tuple[str, fx.Node], ...]:
    """Return the sums on the residual stream in execution order, each with the module path of its addition."""
    additions = _residual_additions(_Ancestry(program))
    return tuple((path_of(addition), _sum(addition)) for addition in additions)


def _residual_additions(ancestry: _Ancestry) -> dict[fx.Node, fx.Node]:
    """Return the residual additions in execution order, each with the value of the stream that it adds to."""
    found: dict[fx.Node, fx.Node] = {}
    for node in ancestry.nodes:
        summands = _summands(node)
        for stream, branch in (summands, summands[::-1]):
            if isinstance(stream, fx.Node) and isinstance(branch, fx.Node) and _is_like(stream, branch):
                # of parallel branches, the second is computed from what the first was added to; where addition and
                # norm are one operator, branches are computed from its other result
                sources = {stream, found.get(stream, stream), _whole(stream)}
                if any(ancestry.between(source, branch) & ancestry.weighted for source in sources):
                    found[node] = stream
                    break
    return found


def _summands(node: fx.Node) -> tuple[Any, Any]:
    """Return what an addition adds, in a form of its own or fused with the norm behind it."""
    if is_call(node, aten.add.Tensor, xf.add_layer_norm, xf.add_rms_norm):
        return node.args[0], node.args[1]
    return None, None


def _sum(addition: fx.Node) -> fx.Node:
    """Return the value of an addition; where the norm is fused with it, that is the second of two results."""
    return next((part for part in _parts(addition) if part.args[1] == 1), addition)


def _parts(addition: fx.Node) -> list[fx.Node]:
    """Return the single results of an operator that has several."""
    return [user for user in addition.users if user.target is operator.getitem]


def _whole(node: fx.Node) -> fx.Node:
    """Return the operator with several results that ``node`` is one of, or ``node`` itself."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _is_like(one: fx.Node, other: fx.Node) -> bool:
    left, right = one.meta.get("val"), other.meta.get("val")
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return left.is_floating_point() and left.dim() > 2 and left.shape == right.shape


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, torch.Tensor) and value.dim() > 1


def _name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _block(name: str, nodes: Sequence[fx.Node]) -> Block:
    inside = set(nodes)
    read = dict.fromkeys(
        given.name for node in nodes for given in node.all_input_nodes if given not in inside and given.op != "get_attr"
    )
    outputs = tuple(node.name for node in nodes if any(user not in inside for user in node.users))
    return Block(name, tuple(node.name for node in nodes), tuple(read), outputs)
