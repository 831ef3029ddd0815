"""Rewriting: a rule looks at one value and returns its replacement, or the reason why there is none.

Every application leaves a :class:`Fired` record with the old and the new form as small functions of the same boundary
values.  The pipeline runs both on real data, so that an exact rewrite is judged where it happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from xformopt.program import Program, infer_value, path_of

__all__ = ["Editor", "Fired", "Region", "Reject", "Rejected", "Rewritten", "Rule", "rewrite", "trace_region"]

_MAX_SWEEPS = 20


@dataclass(frozen=True)
class Reject:
    """A candidate that must stay as it is, and why."""

    reason: str


@dataclass(frozen=True)
class Rejected:
    """A recorded :class:`Reject`: which rule refused which value, where."""

    rule: str
    path: str
    value: str
    reason: str


@dataclass(frozen=True)
class Region:
    """A piece of a graph as a function of boundary values.

    ``nodes`` are operators in execution order; they read each other, parameters and the boundary ``inputs``.
    ``outputs`` are the values the rest of the graph reads.  All are known by name.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Fired:
    """One application of a rule: where, and what became what (``before`` and ``after`` outputs are aligned)."""

    rule: str
    path: str
    before: Region
    after: Region


@dataclass(frozen=True)
class Rewritten:
    """What :func:`rewrite` did."""

    program: Program
    fired: tuple[Fired, ...]
    rejected: tuple[Rejected, ...]


Replacement: TypeAlias = fx.Node | Mapping[fx.Node, fx.Node] | Reject | None
# called with every operator node: None says "not a candidate"
Rule: TypeAlias = Callable[["Editor", fx.Node], Replacement]


class Editor:
    """Builds replacement nodes: inserts them before the value being replaced, infers their shapes, records them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.created: list[fx.Node] = []
        self._root: fx.Node | None = None

    def at(self, root: fx.Node) -> Editor:
        """Insert what follows before ``root`` and take its module path; returns self."""
        self._root = root
        self.created = []
        return self

    def call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Insert an operator node and return it; ``target`` is a torch operator overload or a Python function."""
        assert self._root is not None
        with self.program.graph.inserting_before(self._root):
            named = name or getattr(target, "_opname", None)
            node = self.program.graph.create_node("call_function", target, args, kwargs, name=named)
        try:
            node.meta["val"] = infer_value(self.program, node)
        except Exception:
            self.program.graph.erase_node(node)
            raise
        node.meta["path"] = path_of(self._root)
        self.created.append(node)
        return node

    def parameter(self, name: str, value: torch.Tensor) -> fx.Node:
        """Add a parameter under ``name`` (made unique) and return the node that reads it."""
        key, number = name, 0
        while key in self.program.parameters and self.program.parameters[key] is not value:
            number += 1
            key = f"{name}_{number}"
        reads = self.program.graph.find_nodes(op="get_attr")
        existing: fx.Node | None = next((n for n in reads if n.target == key), None)
        if existing is not None and key in self.program.parameters:
            return existing
        self.program.parameters[key] = value
        first = next(iter(self.program.graph.nodes))
        with self.program.graph.inserting_before(first):
            node = self.program.graph.get_attr(key)
        node.meta["val"] = self.program.dims.fake(tuple(value.shape), value.dtype)
        node.meta["path"] = ""
        return node

    def constant(self, node: object) -> torch.Tensor | None:
        """Return the tensor behind a parameter node, or None for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.program.parameters[str(node.target)]
        return None

    def discard(self) -> None:
        """Erase what was created since :meth:`at`."""
        for node in reversed(self.created):
            if not node.users:
                self.program.graph.erase_node(node)
        self.created = []


def rewrite(program: Program, rules: Mapping[str, Rule] | Sequence[Rule], *, sweeps: int = _MAX_SWEEPS) -> Rewritten:
    """Apply ``rules`` to a copy of ``program`` until none fires; each value meets the rules in the given order.

    Reasons for refusing are those of the last sweep, so a candidate that fired later is not listed.
    """
    named = dict(rules) if isinstance(rules, Mapping) else {rule_name(rule): rule for rule in rules}
    result = program.copy()
    editor = Editor(result)
    fired: list[Fired] = []
    rejected: list[Rejected] = []
    for _ in range(sweeps):
        rejected = []
        count = len(fired)
        for node in list(result.nodes()):
            if not node._erased:
                _visit(editor, node, named, fired, rejected)
        if len(fired) == count:
            break
        result.drop_unused()
    return Rewritten(result.drop_unused(), tuple(fired), tuple(rejected))


def rule_name(rule: Rule) -> str:
    """Return a rule's name as reports show it: ``lift_attention`` is ``lift-attention``."""
    return getattr(rule, "__name__", type(rule).__name__).strip("_").replace("_", "-")


def _visit(
    editor: Editor, node: fx.Node, rules: Mapping[str, Rule], fired: list[Fired], rejected: list[Rejected]
) -> None:
    for name, rule in rules.items():
        outcome = rule(editor.at(node), node)
        if outcome is None:
            editor.discard()
            continue
        if isinstance(outcome, Reject):
            editor.discard()
            rejected.append(Rejected(name, path_of(node), node.name, outcome.reason))
            continue
        replaced = {node: outcome} if isinstance(outcome, fx.Node) else dict(outcome)
        fired.append(_replace(editor, name, node, replaced))
        return


def _replace(editor: Editor, rule: str, root: fx.Node, replaced: dict[fx.Node, fx.Node]) -> Fired:
    created = set(editor.created)
    boundary = {a for new in editor.created for a in new.all_input_nodes if a not in created}
    boundary |= {new for new in replaced.values() if new not in created}
    after = trace_region(editor.program, tuple(replaced.values()), boundary)
    before = trace_region(editor.program, tuple(replaced), boundary)
    for old, new in replaced.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in created)
        new.meta["path"] = path_of(new) or path_of(old)
    for old in replaced:
        _erase_unused(editor.program.graph, old)
    editor.created = []
    return Fired(rule, path_of(root) or root.name, before, after)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    pending = [node]
    while pending:
        candidate = pending.pop()
        if candidate._erased or candidate.users or candidate.op != "call_function":
            continue
        arguments = candidate.all_input_nodes
        graph.erase_node(candidate)
        pending.extend(arguments)


def trace_region(program: Program, outputs: Sequence[fx.Node], boundary: Iterable[fx.Node]) -> Region:
    """Copy the operators that compute ``outputs`` from ``boundary`` (or from program inputs) into a region."""
    stop = {node for node in boundary if node.op != "get_attr"}
    cone = _cone(outputs, stop)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []
    parameters: dict[str, torch.Tensor] = {}
    # the graph's order is the execution order; inputs first, as a graph of its own needs it
    for node in sorted(cone, key=lambda n: (n not in stop and n.op != "placeholder", n)):
        if node in stop or node.op == "placeholder":
            copied[node] = graph.create_node("placeholder", node.name, name=node.name)
            inputs.append(node.name)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.op == "get_attr":
                parameters[str(node.target)] = program.parameters[str(node.target)]
        copied[node].meta = {"val": node.meta.get("val"), "path": path_of(node), "name": node.name}
    graph.output(tuple(copied[node] for node in outputs))
    return Region(graph, tuple(inputs), tuple(node.name for node in outputs), parameters)


def _cone(outputs: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    cone: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in cone:
            continue
        cone.add(node)
        if node not in stop:
            pending.extend(node.all_input_nodes)
    return cone
