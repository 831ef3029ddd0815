"""Fold the prompts of attention layers into constant keys and values (LLaMA-Adapter).

    softmax(s q K^T) V + g softmax(s q K_p^T) V_p,  K_p = P Wk^T, V_p = P Wv^T    ->    K_p and g V_p are parameters

P is a learned prompt, g the gate of each head, tanh of a parameter.  The two softmaxes stay apart: each is normalized
by itself, so that keys of the prompt put in front of the others would share one sum with them, which is another
function.  What is a constant is found by computing it: whatever depends on parameters alone, however often it is
repeated for the items of a batch.

**Exact** up to the rounding of g V_p.  Run it before ``fuse-qkv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.lift.layout import Heads, find_heads, split_heads
from xformopt.lift.probe import Probe
from xformopt.lift.rows import undo_movement
from xformopt.match import arguments, call_with, is_call, xf
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program, value_of
from xformopt.program.interpret import call
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldPrompts"]

aten = torch.ops.aten
# sizes of inputs at which a value is computed, to see whether it depends on them
_SIZES = (2, 5)


@dataclass(frozen=True)
class FoldPrompts(RewritePass):
    """Make keys and values of learned prompts constants, with their gates."""

    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Zhang et al., LLaMA-Adapter, arXiv 2303.16199, section 3.2",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the rules: gated prompts, prompts without a gate, and what then is to be tidied up."""
        return (_fold_gated_prompt, _fold_prompt, _add_before_splitting, undo_movement)


def _fold_gated_prompt(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """Fire at the product of what attends to a prompt with its gate."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for attended, gate in (node.args[:2], node.args[1::-1]):
        if not isinstance(attended, fx.Node) or value_of(attended).dim() != 4:
            continue
        heads = _heads_of_attention(editor, attended)
        if heads is None or _constant_keys(editor, heads.source) is None:
            continue
        factor = _constant(editor, gate) if isinstance(gate, fx.Node) else torch.tensor(gate)
        per_head = factor is not None and (factor.dim() < 2 or factor.shape[-2:] == (1, 1))
        if factor is None or not per_head or factor.numel() not in (1, heads.count):
            return Reject("the gate of the prompt is no constant of each head")
        if any(len(_reading(value)) > 1 for value in (heads.source, attended)):
            return Reject("something reads what attends to the prompt without its gate")
        folded = _with_constants(editor, heads.source, factor.double().flatten())
        return folded if isinstance(folded, Reject) else split_heads(editor, folded, heads.count)
    return None


def _fold_prompt(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """Fire at attention to a prompt; it is done where its keys and values are parameters already."""
    if not is_call(node, xf.attention) or _constant_keys(editor, node) is None:
        return None
    given = arguments(node)
    if all(is_call(given[name], aten.expand.default) and given[name].args[0].op == "get_attr" for name in ("k", "v")):
        return None
    return _with_constants(editor, node, torch.ones(1, dtype=torch.float64))


def _add_before_splitting(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Add what two attentions return as a whole, instead of head by head."""
    if not is_call(node, aten.add.Tensor) or arguments(node)["alpha"] != 1:
        return None
    heads = [_heads_of_attention(editor, term) for term in node.args[:2] if isinstance(term, fx.Node)]
    if len(heads) != 2 or heads[0] is None or heads[1] is None or value_of(node).dim() != 4:
        return None
    if all(_constant_keys(editor, found.source) is None for found in heads if found is not None):
        return None
    whole = editor.call(aten.add.Tensor, heads[0].source, heads[1].source)
    return split_heads(editor, whole, heads[0].count)


def _heads_of_attention(editor: Editor, node: fx.Node) -> Heads | None:
    """Return the attention whose result ``node`` is, split into heads as ``[B, H, T, E]``."""
    if value_of(node).dim() != 4:
        return None
    found = find_heads(Probe(editor.program), node)
    if found is None or not is_call(found.source, xf.attention) or found.time_first:
        return None
    whole = torch.arange(found.channels.numel()).view(found.channels.shape)
    is_whole = torch.equal(found.channels, whole) and found.count == arguments(found.source)["heads"]
    return found if is_whole else None


def _reading(node: fx.Node) -> list[fx.Node]:
    """Return what reads the values of ``node``, and not its sizes alone."""
    return [user for user in node.users if not is_call(user, aten.sym_size.int)]


def _constant_keys(editor: Editor, attention: fx.Node) -> torch.Tensor | None:
    return _same_for_all(editor, arguments(attention)["k"])


def _with_constants(editor: Editor, attention: fx.Node, gate: torch.Tensor) -> fx.Node | Reject:
    """Return attention to constant keys and values, the latter times the gate of each query head (or of all)."""
    given = arguments(attention)
    keys, values = (_same_for_all(editor, given[name]) for name in ("k", "v"))
    if keys is None or values is None:
        return Reject("the keys are those of a prompt, the values are not")
    heads, kv_heads = given["heads"], given["kv_heads"]
    if len(gate) > 1 and kv_heads != heads:
        # query heads that share a value head have gates of their own
        keys, values = (_repeated(value, kv_heads, heads // kv_heads) for value in (keys, values))
        kv_heads = heads
    scaled = values.double().unflatten(2, (kv_heads if len(gate) > 1 else 1, -1)) * gate.view(-1, 1)
    constants = {"k": keys, "v": scaled.flatten(2).to(values.dtype)}
    batch = editor.call(aten.sym_size.int, given["q"], 0)
    expanded = {
        name: editor.call(
            aten.expand.default,
            editor.parameter(f"{attention.name}.prompt.{name}", value.contiguous()),
            [batch, -1, -1],
        )
        for name, value in constants.items()
    }
    return call_with(editor, attention, **expanded, kv_heads=kv_heads)


def _repeated(value: torch.Tensor, kv_heads: int, times: int) -> torch.Tensor:
    found: torch.Tensor = value.unflatten(2, (kv_heads, -1)).repeat_interleave(times, 2).flatten(2)
    return found


def _same_for_all(editor: Editor, node: fx.Node) -> torch.Tensor | None:
    """Return ``[1, P, C]`` where ``node`` is that for every item of a batch, whatever inputs and sizes are."""
    found = [_computed(editor, node, size) for size in _SIZES]
    tensors = [value for value in found if value is not None and value.dim() == 3]
    if len(tensors) < len(found) or len({value.shape[1:] for value in tensors}) > 1:
        return None
    first = tensors[0][:1]
    return first.clone() if all(torch.equal(value, first.expand_as(value)) for value in tensors) else None


def _constant(editor: Editor, node: fx.Node) -> torch.Tensor | None:
    """Return what ``node`` is whatever inputs and sizes are, or None."""
    first, *others = (_computed(editor, node, size) for size in _SIZES)
    same = all(first is not None and other is not None and torch.equal(first, other) for other in others)
    return first if same else None


def _computed(editor: Editor, node: fx.Node, size: int) -> torch.Tensor | None:
    """Return what ``node`` computes from parameters and sizes alone, all of them one size; None if it reads inputs."""
    dims = editor.program.dims
    sizes = {dim.name: min(max(dim.low, size), dim.high or size) for dim in dims}
    known: dict[fx.Node, Any] = {}

    def compute(current: fx.Node) -> bool:
        if current in known:
            return True
        value = current.meta.get("val")
        if isinstance(value, torch.SymInt | int):
            known[current] = dims.evaluate(dims.expression(value), sizes)
            return True
        if current.op == "get_attr":
            known[current] = editor.program.parameters[str(current.target)]
            return True
        if current.op != "call_function" or not all(map(compute, current.all_input_nodes)):
            return False
        arguments_of = fx.map_arg((current.args, dict(current.kwargs)), known.__getitem__)
        known[current] = call(current.target, *arguments_of)
        return True

    with torch.no_grad():
        found = known[node] if compute(node) else None
    return found if isinstance(found, torch.Tensor) else None
