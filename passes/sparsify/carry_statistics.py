"""Attend to a fixed mask between full steps of a denoiser, with statistics that the last full step left (Re-ttention).

    full step      h_i = the share of query i's attention that the mask M hides,  1 - sum_{j in M} softmax(s_i)_j
                   r = softmax(s) v - (1 - h) softmax_M(s) v
    other steps    (1 - h) softmax_M(s) v + r,   then h <- max(h - growth, 0)

Neighbouring steps of a denoiser attend alike, so that what the mask hides at one is nearly what it hides at the next: h
keeps the weights of the keys that are left at their size (the paper's rho is 1 - h, which it lets grow slowly), and r
is what the hidden ones gave.  The two kinds of step are two programs.  Make both from one program with the same options
but ``step``; run the full one first and every few steps (the paper: the first 5 to 15 steps, then every 5th), and feed
its outputs ``present_...`` to the inputs ``past_...`` of the other until it is run again.  The other returns h anew and
leaves r as it is.  An input ``past_...`` that is left out is zeros: the mask alone, with plain softmax.

Masks are one for each head, of the blocks that hold most attention on calibration data, as those of ``mask-attention``
with ``score=mass``; give it inputs of all time steps.

**Approximate**, without training; the full step is exact.

Chen et al., Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape, NeurIPS 2025,
arXiv 2505.22918.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx
from torch.nn import functional

from xformopt.errors import PassError
from xformopt.match import arguments, call_with, is_call, xf
from xformopt.passes.carried_state import CarriedState, empty_region, state_bytes
from xformopt.passes.sparsify.support.attention_maps import collect_maps
from xformopt.passes.sparsify.support.candidates import bias_refusal, masked_attention, refusal
from xformopt.passes.sparsify.support.static_masks import select_blocks
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, path_of, shape_of, value_of
from xformopt.rewrite import Editor, Fired, Rejected

__all__ = ["CarryStatistics"]

aten = torch.ops.aten
_HIDDEN, _RESIDUAL = "hidden", "residual"


@dataclass(frozen=True)
class CarryStatistics(Pass):
    """Make one of the two programs: that of full steps, which leaves statistics, or that of the steps between them.

    Attributes:
        step: Which of the two.
        keep: Share of the visible pairs of queries and keys that a mask keeps, over all layers and heads.
        block: Tokens of a block.
        growth: What the share of the keys that are left grows by from step to step.
        reshape: Whether h is carried at all; without it, r alone is the residual of plain softmax (a control).

    """

    step: Literal["full", "sparse"] = "sparse"
    keep: float = 0.25
    block: int = 8
    growth: float = 0.04
    reshape: bool = True

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Chen et al., Re-ttention, NeurIPS 2025, arXiv 2505.22918",)

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, but is {self.keep}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, but is {self.block}")
        if not 0 <= self.growth < 1:
            raise ValueError(f"growth must be at least 0 and below 1, but is {self.growth}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the masks, then rewrite every attention that can have one."""
        every = [node for node in program.nodes() if is_call(node, xf.attention)]
        if not every:
            raise PassError(f"The program {program.name!r} has no xf.attention, whose statistics could be carried.")
        reasons = {node.name: reason for node in every if (reason := _refusal(program, node)) is not None}
        rejected = tuple(
            Rejected(self.name, path_of(node), node.name, reasons[node.name]) for node in every if node.name in reasons
        )
        able = [node.name for node in every if node.name not in reasons]
        if not able:
            return PassResult(program, False, rejected=rejected)
        maps = collect_maps(program, context.calibration, able, block=self.block)
        masks = select_blocks(maps, {name: found.mass for name, found in maps.items()}, self.keep)
        changed = program.copy()
        state = CarriedState(changed)
        nodes = {node.name: node for node in changed.nodes()}
        for number, name in enumerate(able):
            self._rewrite(state, nodes[name], masks[name], number)
        state.finish()
        fired = tuple(Fired(self.name, path_of(nodes[name]), *[empty_region()] * 2) for name in able)
        kept, visible = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        notes = [f"blocks that masks keep: {kept / visible:.1%}"]
        if self.step == "sparse":
            notes.append(f"{state_bytes(changed):,} bytes of statistics for each item of the batch")
        return PassResult(changed.drop_unused(), True, fired, rejected, tuple(notes))

    def _rewrite(self, state: CarriedState, node: fx.Node, mask: torch.Tensor, number: int) -> None:
        editor = state.editor.at(node)
        given = arguments(node)
        shape = shape_of(state.program, node)
        sparse = masked_attention(editor, node, mask, self.block)
        if self.step == "full":
            full, hidden = _with_hidden(editor, node, mask, self.block)
            left = self._scaled(editor, sparse, hidden, given["heads"])
            state.present(f"{_RESIDUAL}_{number}", editor.call(aten.sub.Tensor, full, left))
            if self.reshape:
                state.present(f"{_HIDDEN}_{number}", hidden)
            node.replace_all_uses_with(full)
            return
        dtype, hidden = value_of(node).dtype, sparse
        if self.reshape:
            hidden = state.past(f"{_HIDDEN}_{number}", (*shape[:2], given["heads"]), dtype)
            grown = editor.call(aten.relu.default, editor.call(aten.sub.Tensor, hidden, self.growth))
            state.present(f"{_HIDDEN}_{number}", grown)
        left = self._scaled(editor, sparse, hidden, given["heads"])
        residual = state.past(f"{_RESIDUAL}_{number}", shape, dtype)
        node.replace_all_uses_with(editor.call(aten.add.Tensor, left, residual))

    def _scaled(self, editor: Editor, sparse: fx.Node, hidden: fx.Node, heads: int) -> fx.Node:
        """Return what the mask leaves ``[B, T, H * E]`` at the size it has in full attention; ``hidden [B, T, H]``."""
        if not self.reshape:
            return sparse
        apart = editor.call(aten.unflatten.int, sparse, 2, [heads, -1])
        scaled = editor.call(aten.mul.Tensor, apart, editor.call(aten.unsqueeze.default, _rest(editor, hidden), 3))
        return editor.call(aten.flatten.using_ints, scaled, 2, 3)


def _refusal(program: Program, node: fx.Node) -> str | None:
    batch, tokens, _ = shape_of(program, node)
    if any(spec.default is not None for spec in program.inputs) or any(
        spec.name.startswith("present_") for spec in program.outputs
    ):
        return "the program carries a state from run to run already"
    if not isinstance(tokens, int):
        return f"the number of its tokens varies ({tokens}), and its statistics have to be of one size"
    if not isinstance(batch, int) and str(batch) not in program.dims:
        return f"it looks through windows: {batch} of them, which are not one item of the batch each"
    return refusal(program, node) or bias_refusal(program, node)


def _with_hidden(editor: Editor, node: fx.Node, mask: torch.Tensor, block: int) -> tuple[fx.Node, fx.Node]:
    """Return full attention, and the share of it that a mask hides from each query ``[B, T, H]``.

    The values are widened by a column for each block of keys, 1 for the keys in it: what they become is the attention
    that the block gets.
    """
    given = arguments(node)
    name, dtype = path_of(node) or node.name, value_of(node).dtype
    heads, kv_heads = given["heads"], given["kv_heads"]
    _, tokens, width = value_of(node).shape
    blocks, depth = mask.shape[1], int(width) // heads
    of = torch.arange(int(tokens)) // block
    columns = functional.pad(functional.one_hot(of, blocks), (depth, 0))[None, :, None].to(dtype)  # [1, T, 1, E + N]
    apart = editor.call(aten.unflatten.int, given["v"], 2, [kv_heads, depth])
    room = editor.call(aten.constant_pad_nd.default, apart, [0, blocks])
    wide = editor.call(aten.add.Tensor, room, editor.parameter(f"{name}.blocks", columns))
    v = editor.call(aten.flatten.using_ints, wide, 2, 3)
    both = call_with(editor, node, v=v)
    split = editor.call(aten.unflatten.int, both, 2, [heads, depth + blocks])
    full = editor.call(aten.slice.Tensor, split, 3, 0, depth)
    mass = editor.call(aten.slice.Tensor, split, 3, depth, depth + blocks)  # [B, T, H, N]
    kept = mask[:, of].transpose(0, 1)[None].to(dtype)  # [1, T, H, N]
    seen = editor.call(aten.mul.Tensor, mass, editor.parameter(f"{name}.kept", kept))
    hidden = _rest(editor, editor.call(aten.sum.dim_IntList, seen, [3]))
    return editor.call(aten.flatten.using_ints, full, 2, 3), hidden


def _rest(editor: Editor, share: fx.Node) -> fx.Node:
    return editor.call(aten.add.Tensor, editor.call(aten.mul.Tensor, share, -1.0), 1.0)
