"""Recompute only the tokens that changed since the last frame (Eventful Transformers), for video and repeated input.

A gate stands before each group of operators that work token by token (queries, keys and values; the projection behind
attention; the MLP), a buffer behind it.  The gate keeps a reference u, and lets the r tokens through that differ most:

    e = x - u;   I = the r tokens of largest ||e||;   u[I] = x[I];   y = f(x[I]);   buffer[I] = y

What reads the group reads its buffer.  References and buffers are inputs ``past_...`` and outputs ``present_...`` of
the program: feed each frame the outputs of the one before.  The first frame leaves them out.  r is chosen at run time,
frame by frame, by the length of the input ``ranks``, which holds 0, 1, ..., r - 1; left out, all tokens are
recomputed, and the answer is exactly that of the program without gates.

This is the paper's token-wise variant (its section 4.1 with the top-r policy): the two products of attention are
computed in full, from the buffers.  Gates stand behind norms, which are cheap and are computed for every token.

**Approximate** where r is less than the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.passes.carried_state import CarriedState, empty_region, state_bytes
from xformopt.passes.tokenwise import RefusalError, is_tokenwise, place_of
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Dim, Input, Program, path_of, shape_of, value_of
from xformopt.program.dims import Shape
from xformopt.rewrite import Fired, Rejected

__all__ = ["GateTokens"]

_RANKS, _RECOMPUTED = "ranks", "recomputed"
_LINEAR = (xf.linear, xf.linear_activation)


@dataclass(frozen=True)
class GateTokens(Pass):
    """Put token gates and buffers around linear layers, with their state as inputs and outputs."""

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Dutson et al., Eventful Transformers, arXiv 2308.13494, section 4.1 (token-wise operators, top-r policy)",
    )

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the groups, and gate each."""
        try:
            batch, tokens = _stream_shape(program)
            groups, rejected = _find_groups(program, (batch, tokens))
            if not groups:
                raise RefusalError(None, f"no linear layer works on tokens [{batch}, {tokens}, channels]")
        except RefusalError as refusal:
            return PassResult(program, False, rejected=(self._rejected(refusal),))
        changed = program.copy(dims=program.dims.extended(Dim(_RECOMPUTED, 1, tokens)))
        state = CarriedState(changed)
        ranks = state.take(Input(_RANKS, torch.int64, (_RECOMPUTED,), tokens, "ascending"))
        for number, group in enumerate(groups):
            _gate(state, group.of(changed), ranks, number)
        state.finish()
        fired = tuple(Fired(self.name, path_of(group.members[0]), *[empty_region()] * 2) for group in groups)
        note = f"{len(groups)} gates; {state_bytes(changed):,} bytes of state for each stream of frames"
        return PassResult(changed.drop_unused(), True, fired, tuple(map(self._rejected, rejected)), (note,))

    def _rejected(self, refusal: RefusalError) -> Rejected:
        name = refusal.node.name if refusal.node is not None else ""
        return Rejected(self.name, place_of(refusal.node), name, refusal.reason)


@dataclass(frozen=True)
class _Group:
    """Operators that work token by token on one value ``root``, and those of them that others read."""

    root: fx.Node
    members: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def of(self, program: Program) -> _Group:
        """Return the same group in a copy of its program."""
        copies = {node.name: node for node in program.graph.nodes}
        members, results = ([copies[node.name] for node in nodes] for nodes in (self.members, self.results))
        return _Group(copies[self.root.name], tuple(members), tuple(results))


def _stream_shape(program: Program) -> tuple[object, int]:
    """Return the batch and the number of tokens of the first attention."""
    if found := [node for node in program.nodes() if is_call(node, xf.changed_tokens)]:
        raise RefusalError(found[0], "its tokens stand behind gates already")
    first = next((node for node in program.nodes() if is_call(node, xf.attention)), None)
    if first is None:
        raise RefusalError(None, "there is no xf.attention, and so nothing that says what the tokens are")
    batch, tokens, _ = shape_of(program, arguments(first)["q"])
    if not isinstance(tokens, int):
        raise RefusalError(first, f"the number of its tokens varies ({tokens}), and a state has to be of one size")
    if not isinstance(batch, int) and str(batch) not in program.dims:
        raise RefusalError(first, f"it looks through windows: {batch} of them, which are not one stream of frames each")
    if _RECOMPUTED in program.dims or _RANKS in program.input_names:
        raise RefusalError(first, f"the names {_RECOMPUTED!r} and {_RANKS!r} are taken")
    return batch, tokens


def _find_groups(program: Program, stream: tuple[object, int]) -> tuple[list[_Group], list[RefusalError]]:
    """Return the groups in execution order, and why other linear layers are in none."""
    groups: list[_Group] = []
    rejected: list[RefusalError] = []
    taken: set[fx.Node] = set()
    for node in program.nodes():
        if not is_call(node, *_LINEAR) or node in taken:
            continue
        root: fx.Node = arguments(node)["x"]
        shape = shape_of(program, root)
        if root in taken or root.op == "get_attr":
            continue
        if len(shape) != 3 or shape[:2] != stream:
            if len(shape) > 2:
                rejected.append(RefusalError(node, f"it works on {_written(shape)}, not on the stream's tokens"))
            continue
        members = _members(program, root)
        taken.update(members)
        inside = set(members)
        results = tuple(m for m in members if any(user not in inside for user in m.users))
        groups.append(_Group(root, members, results))
    return groups, rejected


def _members(program: Program, root: fx.Node) -> tuple[fx.Node, ...]:
    """Return the linear layers that read ``root``, and what works token by token on nothing else than theirs."""
    found: dict[fx.Node, None] = {}
    for node in program.nodes():
        held = [value for value in node.all_input_nodes if value in found]
        first = is_call(node, *_LINEAR) and arguments(node)["x"] is root and is_tokenwise(node, [root])
        if first or (held and is_tokenwise(node, held)):
            found[node] = None
    return tuple(found)


def _gate(state: CarriedState, group: _Group, ranks: fx.Node, number: int) -> None:
    """Compute a group for the tokens that changed, and let its readers read the buffers."""
    editor, members = state.editor.at(group.members[0]), set(group.members)
    past = _past(state, f"reference_{number}", group.root)
    changed = editor.call(xf.changed_tokens, group.root, past, ranks)
    rows = editor.call(xf.select_tokens, group.root, changed)
    state.present(f"reference_{number}", editor.call(xf.update_tokens, past, changed, rows))
    fresh: dict[fx.Node, fx.Node] = {group.root: rows}

    def renewed(value: fx.Node) -> fx.Node:
        return fresh.get(value, value)

    for node in group.members:
        editor.at(node)
        args = fx.map_arg(node.args, renewed)
        kwargs: dict[str, Any] = fx.map_arg(node.kwargs, renewed)
        fresh[node] = editor.call(node.target, *args, **kwargs)
        if node not in group.results:
            continue
        label = f"buffer_{number}" if len(group.results) == 1 else f"buffer_{number}_{group.results.index(node)}"
        buffer = editor.call(xf.update_tokens, _past(state, label, node), changed, fresh[node])
        state.present(label, buffer)
        node.replace_all_uses_with(buffer, delete_user_cb=lambda user: user not in members)
    for node in reversed(group.members):
        state.program.graph.erase_node(node)


def _past(state: CarriedState, label: str, like: fx.Node) -> fx.Node:
    return state.past(label, shape_of(state.program, like), value_of(like).dtype)


def _written(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
