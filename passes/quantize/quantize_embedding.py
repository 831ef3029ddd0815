"""Store tables of embeddings in 4 or 8 bits.

    y = table[i]    ->    y = (codes[i] - zero[i]) * scale[i],    one scale per row and group of channels

**Approximate**; needs no data.  A table that something else reads, such as a tied head, stays as it is: it would have
to be stored twice.  The table is stored in few bits, and its rows computed in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, is_call, xf
from xformopt.passes.quantize.support.quantization import PackedGroups, check_groups, quantize_groups
from xformopt.passes.quantize.support.quantized_layers import refuse_repetition
from xformopt.passes.weights import is_skipped
from xformopt.pipeline import Context, Effect, PassResult, RewritePass
from xformopt.program import Level, Program, path_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["QuantizeEmbedding"]


@dataclass(frozen=True)
class QuantizeEmbedding(RewritePass):
    """Store tables of embeddings in few bits.

    Attributes:
        skip: Shell patterns of module paths or table names that stay in floating point.
        bits: Of a code, 4 or 8.
        group: Neighbouring channels that share a scale: 16, 32, 64, 128 or 256.
        symmetric: Zero is the middle code, instead of a code of each group's own.
        min_rows: Smaller tables stay in floating point.

    """

    skip: tuple[str, ...] = ()
    bits: int = 8
    group: int = 32
    symmetric: bool = False
    min_rows: int = 64

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = ("Guan et al., arXiv 1911.02079 (row-wise quantized embedding tables)",)

    def __post_init__(self) -> None:
        check_groups(self.bits, self.group)

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every table, unless that was done before."""
        if not any(is_call(node, torch.ops.aten.embedding.default) for node in program.nodes()):
            refuse_repetition(program, {"quantized_embedding"}, "tables of embeddings")
        return super().run(program, context)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the look-up."""
        made: dict[str, PackedGroups] = {}

        def quantize_embedding(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, torch.ops.aten.embedding.default):
                return None
            given = arguments(node)
            source = given["weight"]
            table = editor.constant(source)
            if refusal := self._refusal(node, source, table):
                return refusal
            assert table is not None
            name = str(source.target)
            if name not in made:
                found = quantize_groups(table, bits=self.bits, group=self.group, symmetric=self.symmetric)
                made[name] = found.packed().as_rows()
            codes, scale, zero = made[name].parameters(editor, name)
            return editor.call(xf.quantized_embedding, codes, given["indices"], scale, zero, bits=self.bits)

        return (quantize_embedding,)

    def _refusal(self, node: fx.Node, source: fx.Node, table: torch.Tensor | None) -> Reject | None:
        if table is None:
            return Reject("the table is computed, not a parameter")
        if is_skipped(node, self.skip):
            return Reject("it is named in skip")
        if len(table) < self.min_rows:
            return Reject(f"a table of {len(table)} rows is small (min_rows={self.min_rows})")
        if table.shape[1] % self.group:
            return Reject(f"groups of {self.group} do not divide its {table.shape[1]} channels")
        if any(not is_call(user, torch.ops.aten.embedding.default) for user in source.users):
            return Reject("something else reads the table, which would be stored twice")
        if not bool(table.isfinite().all()):
            raise PassError(
                f"The table {source.target} of {path_of(node) or node.name} holds NaN or infinite values, which no "
                f"code stands for. Restore the checkpoint, or leave the table out with skip."
            )
        return None
