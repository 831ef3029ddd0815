"""Let each query of chosen attentions see its best keys alone (AxFormer's hard attention).

    softmax(l) v    ->    softmax(l + b) v,    b_ij = 0 where l_ij is among the k largest of row i, else -inf

**Approximate**, without training.  It changes what is computed, not how much: the logits are needed twice, and the
program becomes slower.  The claim is accuracy (keys of little weight add noise), so judge it by the task.  Queries with
fewer than k visible keys keep all of them; of equal logits at the border, all stay.

Nagarajan et al., AxFormer, arXiv 2010.03688, section on hard attention.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, call_with, is_call, xf
from xformopt.pipeline import Context, Effect, PassResult, RewritePass
from xformopt.program import Program, path_of, shape_of, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["HardenAttention"]

aten = torch.ops.aten
# stands for minus infinity where sums of two must stay finite
_HIDDEN = -1e30


@dataclass(frozen=True)
class HardenAttention(RewritePass):
    """Let each query of chosen attentions see its best keys alone.

    Attributes:
        keys: How many keys a query keeps.
        layers: Shell patterns of module paths of the attentions; empty: the last quarter of them.

    """

    keys: int = 16
    layers: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Nagarajan et al., AxFormer, arXiv 2010.03688",)

    def __post_init__(self) -> None:
        if self.keys < 1:
            raise ValueError(f"keys must be at least 1, but is {self.keys}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite the chosen attentions once each."""
        if not any(is_call(node, xf.attention) for node in program.nodes()):
            raise PassError(
                f"The program {program.name!r} has no attention to harden. Looked for xf.attention; its operators are "
                f"others, or were fused by a pass that belongs after this one."
            )
        return super().run(program, context)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the attention."""
        every = [node.name for node in program.nodes() if is_call(node, xf.attention)]
        late = set(every[-max(1, len(every) // 4) :])

        def harden_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.attention) or node.name not in every:
                return None
            path = path_of(node)
            if not (any(fnmatchcase(path, p) for p in self.layers) if self.layers else node.name in late):
                return Reject("it is not among the chosen layers")
            return self._harden(editor, node)

        return (harden_attention,)

    def _harden(self, editor: Editor, node: fx.Node) -> fx.Node | Reject:
        given = arguments(node)
        keys = shape_of(editor.program, given["k"])[1]
        if isinstance(keys, int) and keys <= self.keys:
            return Reject(f"it has only {keys} keys, of which {self.keys} would stay")
        by_position = given["causal"] or given["window_left"] >= 0 or given["window_right"] >= 0
        if by_position and keys != shape_of(editor.program, node)[1]:
            return Reject("which keys are visible depends on the position, and queries and keys differ in number")
        logits = _logits(editor, given)
        if by_position:
            logits = _hide_by_position(editor, given, logits)
        # as many hidden keys more than are asked for, so that short inputs have enough
        enough = editor.call(aten.constant_pad_nd.default, logits, [0, self.keys], _HIDDEN)
        best = editor.call(aten.topk.default, enough, self.keys, -1)
        border = editor.call(aten.slice.Tensor, editor.call(operator.getitem, best, 0), 3, self.keys - 1, self.keys)
        hidden = _hide(editor, editor.call(aten.lt.Tensor, logits, border), value_of(node).dtype)
        if given["bias"] is not None:
            hidden = editor.call(aten.add.Tensor, hidden, given["bias"])
        return call_with(editor, node, bias=hidden)


def _logits(editor: Editor, given: dict[str, Any]) -> fx.Node:
    """Compute the logits with all that is added to them but the rule of positions, ``[B, H, T, S]``."""
    heads, kv_heads = given["heads"], given["kv_heads"]
    split = [_split(editor, given["q"], heads), _split(editor, given["k"], kv_heads)]
    if kv_heads < heads:
        # each key/value head beside the query heads that it serves: [B, K, H/K, T, D] and [B, K, 1, S, D]
        split[0] = editor.call(aten.unflatten.int, split[0], 1, [kv_heads, heads // kv_heads])
        split[1] = editor.call(aten.unsqueeze.default, split[1], 2)
    q = editor.call(aten.mul.Tensor, split[0], given["scale"])
    logits = editor.call(aten.matmul.default, q, editor.call(aten.transpose.int, split[1], -1, -2))
    if kv_heads < heads:
        logits = editor.call(aten.flatten.using_ints, logits, 1, 2)
    if given["bias"] is not None:
        logits = editor.call(aten.add.Tensor, logits, given["bias"])
    if given["key_log_size"] is not None:
        logits = editor.call(aten.add.Tensor, logits, _over_keys(editor, given["key_log_size"]))
    if given["key_mask"] is not None:
        absent = editor.call(aten.logical_not.default, _over_keys(editor, given["key_mask"]))
        logits = editor.call(aten.add.Tensor, logits, _hide(editor, absent, value_of(logits).dtype))
    return logits


def _split(editor: Editor, value: fx.Node, heads: int) -> fx.Node:
    """Return ``[B, T, H * D]`` as ``[B, H, T, D]``."""
    width = int(value_of(value).shape[2])
    parts = editor.call(aten.unflatten.int, value, 2, [heads, width // heads])
    return editor.call(aten.permute.default, parts, [0, 2, 1, 3])


def _over_keys(editor: Editor, value: fx.Node) -> fx.Node:
    """Return ``[B, S]`` as ``[B, 1, 1, S]``."""
    return editor.call(aten.unsqueeze.default, editor.call(aten.unsqueeze.default, value, 1), 1)


def _hide(editor: Editor, condition: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return what hides a key when added to its logit, where ``condition`` holds, and 0 elsewhere."""
    return editor.call(aten.mul.Tensor, editor.call(aten._to_copy.default, condition, dtype=dtype), _HIDDEN)


def _hide_by_position(editor: Editor, given: dict[str, Any], logits: fx.Node) -> fx.Node:
    """Hide the keys outside of the window, for as many queries as keys."""
    length: Any = shape_of(editor.program, given["k"])[1]
    if not isinstance(length, int):
        length = editor.call(aten.sym_size.int, given["k"], 1)
    positions = editor.call(aten.arange.default, length, device=torch.device("cpu"), pin_memory=False)
    distance = editor.call(aten.sub.Tensor, positions, editor.call(aten.unsqueeze.default, positions, 1))  # j - i
    outside = []
    if given["causal"]:
        outside.append(editor.call(aten.gt.Scalar, distance, 0))
    if given["window_left"] >= 0:
        outside.append(editor.call(aten.lt.Scalar, distance, -given["window_left"]))
    if given["window_right"] >= 0:
        outside.append(editor.call(aten.gt.Scalar, distance, given["window_right"]))
    for condition in outside:
        logits = editor.call(aten.add.Tensor, logits, _hide(editor, condition, value_of(logits).dtype))
    return logits
