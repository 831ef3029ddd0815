"""Compute no padding: only tokens that count go through linear layers, norms, activations and attention.

    y = f(x)    ->    places = prefix sums over the mask;  y = unpack(f(pack(x, places)), places)

Tokens are packed once, in front of the first linear layers, sequence after sequence; attention works inside each
sequence; they get their places back where an output, a mean over tokens or a reader of single places needs them
(ByteTransformer).  Work on single tokens shrinks by the share of padding.

**Exact** at every position that the mask keeps.  At padding, outputs hold zeros.  A position that is read by its place
(the class token) is computed even where the mask calls it padding.  A sequence that is all padding has no tokens at
all, or those alone, which see no keys: their attention is zero.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.passes.fuse.support.packed_region import PackedRegion, find_region
from xformopt.passes.tokenwise import RefusalError, place_of
from xformopt.pipeline import Context, Pass, PassResult
from xformopt.program import Level, Program, path_of
from xformopt.rewrite import Editor, Fired, Rejected, trace_region

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing(Pass):
    """Pack the tokens that are not padding, and compute nothing else."""

    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = ("Zhai et al., IPDPS 2023, arXiv 2210.03052",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Find what can be packed, and rewrite it as one region."""
        copy = program.copy()
        try:
            region = find_region(copy)
        except RefusalError as refusal:
            name = refusal.node.name if refusal.node is not None else ""
            rejected = Rejected(self.name, place_of(refusal.node), name, refusal.reason)
            return PassResult(program, False, rejected=(rejected,))
        packer = _Packer(copy, region)
        packer.build()
        before = trace_region(program, _named(program, packer.replaced), _named(program, packer.packed))
        after = trace_region(copy, tuple(packer.replaced.values()), packer.packed)
        copy.drop_unused()
        copy.level = max(program.level, self.leaves, key=list(Level).index)
        fired = Fired(self.name, place_of(region.attentions[0]), before, after)
        return PassResult(copy, True, (fired,), notes=(_describe(region),))


class _Packer:
    """Builds the packed form of a region beside the padded one, and lets readers read it."""

    def __init__(self, program: Program, region: PackedRegion) -> None:
        self.region = region
        self.editor = Editor(program)
        self.twins: dict[fx.Node, fx.Node] = {}
        # values packed at the entry, with the node that packs them
        self.packed: dict[fx.Node, fx.Node] = {}
        # what the rest of the program read, by name, with what it reads now
        self.replaced: dict[str, fx.Node] = {}

    def build(self) -> None:
        """Insert the plan, the packed form of every value, and what unpacks them."""
        self.places, self.offsets, self.keys = self._plan()
        for node in self.region.values:
            self.editor.at(node)
            self.twins[node] = self._attention(node) if is_call(node, xf.attention) else self._apply(node)
        for value, readers in self.region.reads.items():
            self._unpack(value, readers)

    def _plan(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        mask, front = self.region.mask, self.region.front
        self._hoist(mask)
        self.editor.at(mask.next)
        plan = self.editor.call(xf.plan_packing, mask, front=front)
        places, offsets = (self._part(plan, index) for index in (0, 1))
        return places, offsets, self._part(plan, 2) if front else None

    def _part(self, plan: fx.Node, index: int) -> fx.Node:
        return self.editor.call(operator.getitem, plan, index)

    def _hoist(self, mask: fx.Node) -> None:
        """Compute the mask before anything else: the plan is needed by the first linear layer."""
        cone: set[fx.Node] = set()
        pending = [mask]
        while pending:
            node = pending.pop()
            if node.op == "call_function" and node not in cone:
                cone.add(node)
                pending += node.all_input_nodes
        first = next(node for node in self.editor.program.nodes() if node not in cone)
        for node in sorted(cone):
            first.prepend(node)

    def _packed(self, value: fx.Node) -> fx.Node:
        """Return the packed form of a value that holds tokens."""
        if value in self.twins:
            return self.twins[value]
        if value not in self.packed:
            self.packed[value] = self.editor.call(xf.pack_tokens, value, self.places)
        return self.packed[value]

    def _attention(self, node: fx.Node) -> fx.Node:
        given = arguments(node)
        operands = (self._packed(given[name]) for name in ("q", "k", "v"))
        options = {name: given[name] for name in ("heads", "kv_heads", "scale", "causal")}
        return self.editor.call(xf.attention_packed, *operands, self.offsets, self.keys, **options)

    def _apply(self, node: fx.Node) -> fx.Node:
        held = self.region.values[node]

        def packed(argument: fx.Node) -> Any:
            return self._packed(argument) if argument in held else argument

        args: Any = fx.map_arg(node.args, packed)
        kwargs: Any = fx.map_arg(node.kwargs, packed)
        return self.editor.call(node.target, *args, **kwargs)

    def _unpack(self, value: fx.Node, readers: list[fx.Node]) -> None:
        self.editor.at(readers[0])
        whole = self.editor.call(xf.unpack_tokens, self.twins[value], self.places, self.region.mask)
        whole.meta["path"] = path_of(value)
        for reader in readers:
            reader.replace_input_with(value, whole)
            if reader.op == "output":
                self.replaced[value.name] = whole
            else:
                self.replaced[reader.name] = reader


def _named(program: Program, names: Any) -> tuple[fx.Node, ...]:
    """Return the nodes of ``program`` that have the names of others."""
    wanted = [name if isinstance(name, str) else name.name for name in names]
    found = {node.name: node for node in program.graph.nodes}
    return tuple(found[name] for name in wanted)


def _describe(region: PackedRegion) -> str:
    front = f"; the first {region.front} of each sequence are read by place" if region.front else ""
    return f"{len(region.attentions)} attentions and {len(region.values)} values on packed tokens{front}"
