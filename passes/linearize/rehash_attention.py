"""Learn the hash functions of attention by codes anew, on the vectors that the program computes by now.

    x = normalise(shared projection),   H(x) = sign(A kappa(x)):   A and the anchors in kappa are fitted again

EcoFormer fine-tunes a model while its codes stand still, and learns them again every so often: training moves what the
shared projections read, and the anchors, which are vectors of an earlier model, fall behind.  The sign has no gradient,
so that training does not move the codes themselves.  Recovery and this pass take turns to that end:

    linearize-eco, recover-accuracy, rehash-attention, recover-accuracy, ...

How many bits and anchors there are stays as it is.

**Approximate**: codes change at once, and what reads the values behind them learns of it in the recovery that follows.

Liu et al., EcoFormer, NeurIPS 2022, arXiv 2209.09004.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.nn import functional

from xformopt.errors import PassError
from xformopt.match import is_call
from xformopt.passes.linearize.support.hashing import Hashing, fit_hashing
from xformopt.passes.samples import sample_rows
from xformopt.pipeline import Context, Effect, RewritePass
from xformopt.program import Program, path_of, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["RehashAttention"]

aten = torch.ops.aten
_SAMPLE = 256
_TABLES = ("anchors", "offset", "mixing", "thresholds")


@dataclass(frozen=True)
class RehashAttention(RewritePass):
    """Learn the hash functions of attention by codes anew.

    Attributes:
        neighbours: Most and least similar vectors that codes are learned from.

    """

    neighbours: int = 10

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Liu et al., EcoFormer, NeurIPS 2022, arXiv 2209.09004",)

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, but is {self.neighbours}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires where a code becomes bits."""
        found = {node.name: codes for node in program.nodes() if (codes := _codes_of(node)) is not None}
        if not found:
            raise PassError(
                f"The program {program.name!r} has no attention by learned codes. Looked for what linearize-eco makes; "
                f"run this behind it, before passes that fuse or quantize."
            )
        shared = {name: codes.shared.name for name, codes in found.items()}
        samples = sample_rows(program, context.calibration, shared.values(), rows=_SAMPLE)
        learned = {name: self._learn(codes, samples[shared[name]], context.seed) for name, codes in found.items()}

        def rehash_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in found:
                return None
            codes, tables = found[node.name], learned[node.name]
            if isinstance(tables, str):
                return Reject(tables)
            known = [editor.program.parameters[str(read.target)] for read in codes.tables]
            fresh = [getattr(tables, table).to(old.dtype) for table, old in zip(_TABLES, known, strict=True)]
            if all(torch.equal(one, other) for one, other in zip(fresh, known, strict=True)):
                return Reject("its codes are those of this data already")
            return _hashed(editor, node, fresh)

        return (rehash_attention,)

    def _learn(self, codes: _Codes, rows: torch.Tensor, seed: int) -> Hashing | str:
        anchors, mixing = (value_of(codes.tables[number]) for number in (0, 2))
        heads, _, count = anchors.shape
        if count > len(rows) or 2 * self.neighbours > len(rows):
            return f"the {len(rows)} tokens of the data are fewer than its {count} anchors or 2 x {self.neighbours}"
        vectors = functional.normalize(rows.unflatten(-1, (int(heads), -1)), dim=-1).transpose(0, 1)
        bits = int(mixing.shape[2])
        return fit_hashing(vectors, bits=bits, anchors=int(count), neighbours=self.neighbours, seed=seed)


@dataclass(frozen=True)
class _Codes:
    """Where the codes of one attention are computed: the shared projection ``[B, T, H * D]``, and the tables read."""

    shared: fx.Node
    tables: tuple[fx.Node, ...]


def _codes_of(node: fx.Node) -> _Codes | None:
    """Return the codes whose bits ``node`` is, or None where it is none.

    Bits are ``exp(x anchors + offset) mixing >= thresholds`` with x the unit vectors of the shared projection, heads
    first.
    """
    targets = (aten.ge.Tensor, aten.matmul.default, aten.exp.default, aten.add.Tensor, aten.matmul.default)
    chain: list[fx.Node] = []
    at: object = node
    for target in (*targets, aten.permute.default, aten.div.Tensor, aten.unflatten.int):
        if not isinstance(at, fx.Node) or not is_call(at, target):
            return None
        chain.append(at)
        at = at.args[0]
    compared, mixed, _, added, products, *_ = chain
    tables = (products.args[1], added.args[1], mixed.args[1], compared.args[1])
    if not isinstance(at, fx.Node):
        return None
    reads = tuple(table for table in tables if isinstance(table, fx.Node) and table.op == "get_attr")
    return _Codes(at, reads) if len(reads) == len(tables) else None


def _hashed(editor: Editor, node: fx.Node, tables: Sequence[torch.Tensor]) -> fx.Node:
    """Insert the bits of a code by new tables, of the vectors that ``node`` has them of."""
    x = node
    for _ in range(5):
        read = x.args[0]
        assert isinstance(read, fx.Node)
        x = read
    path = path_of(node) or node.name
    anchors, offset, mixing, thresholds = (
        editor.parameter(f"{path}.{table}", value) for table, value in zip(_TABLES, tables, strict=True)
    )
    products = editor.call(aten.matmul.default, x, anchors)
    kernel = editor.call(aten.exp.default, editor.call(aten.add.Tensor, products, offset))
    return editor.call(aten.ge.Tensor, editor.call(aten.matmul.default, kernel, mixing), thresholds)
