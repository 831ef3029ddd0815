"""Mix channels by their largest products alone, at several shares, weighted (DRSformer's top-k attention).

    softmax(L) v    ->    sum_r w_r softmax(L where among the largest r D of its row) v,   r = 1/2, 2/3, 3/4, 4/5

L are the products of channels (``xf.xca``), D the channels of a head; each w_r starts as a quarter and can be trained.

**Approximate**, and it **saves nothing**: which products are largest is known when all are computed, and there are
several softmaxes in the place of one.  It is a regulariser of models that are trained with it, as DRSformer is; in a
model trained without, this is the control, and a start for ``recover-accuracy``.

Chen et al., Learning A Sparse Transformer Network for Effective Image Deraining (DRSformer), CVPR 2023,
arXiv 2303.11950.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, call_with, is_call, xf
from xformopt.pipeline import Context, Effect, PassResult, RewritePass
from xformopt.program import Program, path_of, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["SelectChannels"]

aten = torch.ops.aten
_SHARES = (Fraction(1, 2), Fraction(2, 3), Fraction(3, 4), Fraction(4, 5))


@dataclass(frozen=True)
class SelectChannels(RewritePass):
    """Mix channels by their largest products alone, at several shares, weighted."""

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Chen et al., DRSformer, CVPR 2023, arXiv 2303.11950",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite every attention between channels once, and say what it costs."""
        result = super().run(program, context)
        notes = ("no work is saved: all products of channels are computed",) if result.changed else ()
        return PassResult(result.program, result.changed, result.fired, result.rejected, notes)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at attention between channels."""
        every = {node.name for node in program.nodes() if is_call(node, xf.xca)}
        if not every:
            raise PassError(
                f"The program {program.name!r} has no attention between channels to select from. Looked for xf.xca."
            )

        def select_channels(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in every:
                return None
            if arguments(node)["top"]:
                return Reject("it mixes the largest products alone already")
            depth = int(value_of(node).shape[2]) // int(arguments(node)["heads"])
            counts = [int(share * depth) for share in _SHARES]
            if counts[0] < 1:
                return Reject(f"its heads of {depth} channels have none to leave out")
            return _mixed(editor, node, counts)

        return (select_channels,)


def _mixed(editor: Editor, node: fx.Node, counts: Sequence[int]) -> fx.Node:
    weights = editor.parameter(
        f"{path_of(node) or node.name}.shares", torch.full((len(counts),), 1 / len(counts), dtype=value_of(node).dtype)
    )
    total: fx.Node | None = None
    for number, count in enumerate(counts):
        weight = editor.call(aten.select.int, weights, 0, number)
        part = editor.call(aten.mul.Tensor, call_with(editor, node, top=count), weight)
        total = part if total is None else editor.call(aten.add.Tensor, total, part)
    assert total is not None
    return total
