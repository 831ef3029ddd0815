"""From one export to a runnable ONNX graph: every xf node replaced by one of its forms, then cleaned up."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from xformopt.errors import LoweringError
from xformopt.kernels.definition import load_operators
from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.lowering.onnx_export import OPSET, Exported
from xformopt.lowering.onnx_flatten import flatten_tokens

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Built", "Choice", "build_graph", "forms_of", "offered_forms"]

# form name by operator; an operator left out, or a node the form refuses, takes the first form that accepts
Choice = Mapping[str, str]

_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


class Built(NamedTuple):
    """A runnable model, and how many nodes of each operator took each form."""

    model: ir.Model
    forms: dict[str, dict[str, int]]


@cache
def forms_of(operator: str) -> tuple[Form, ...]:
    """Return the ONNX forms of an xf operator, preferred first; none where it has no ``onnx.py``."""
    name = f"xformopt.kernels.{operator}.onnx"
    if importlib.util.find_spec(name) is None:
        return ()
    forms: tuple[Form, ...] = importlib.import_module(name).FORMS
    return forms


def build_graph(exported: Exported, choice: Choice, *, standard_only: bool = False, on_gpu: bool = False) -> Built:
    """Return a model without xf nodes; the export itself is left as it is.

    Args:
        exported: What to build from.
        choice: The form of each operator.
        standard_only: Use no operator outside of the ONNX standard.
        on_gpu: Use no operator that ONNX Runtime has for processors alone.

    Raises:
        LoweringError: an operator has no form that expresses one of its nodes.

    """
    expansion = _Expansion(exported, choice, standard_only, on_gpu).run()
    _clean_up(expansion.model)
    return Built(expansion.model, {operator: dict(count) for operator, count in sorted(expansion.used.items())})


def offered_forms(
    exported: Exported, *, standard_only: bool = False, on_gpu: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return, for each operator that occurs and may be written in several ways, the names of its forms.

    The default comes first.
    """
    offered = _Expansion(exported, {}, standard_only, on_gpu).run().offered
    return {operator: tuple(names) for operator, names in offered.items() if len(names) > 1}


class _Expansion:
    """One walk over a graph that replaces xf nodes, and those their forms emit."""

    def __init__(self, exported: Exported, choice: Choice, standard_only: bool, on_gpu: bool) -> None:
        self.model = exported.model.clone()
        self.builder = Builder(self.model.graph, exported.derived)
        self.choice = choice
        self.standard_only, self.on_gpu = standard_only, on_gpu
        self.offered: dict[str, dict[str, None]] = {}
        self.used: dict[str, Counter[str]] = {}

    def run(self) -> _Expansion:
        for node in list(self.model.graph):
            if node.domain == "xf":
                self._expand(node)
        return self

    def _expand(self, node: ir.Node) -> None:
        view = _view(node)
        form = self._pick(view)
        values = form.build(self.builder.at(node, view.path), view)
        emitted = list(self.builder.pending)
        self._replace(node, values)
        for inner in emitted:
            self._expand(inner)

    def _pick(self, view: XfNode) -> Form:
        reasons: list[str] = []
        accepted: list[Form] = []
        for form in forms_of(view.operator):
            reason = self._unfit(form) or form.accepts(view)
            if reason is None:
                accepted.append(form)
            else:
                reasons.append(f"{form.name}: {reason}")
        if not accepted:
            raise LoweringError(
                f"xf.{view.operator} at {view.path or 'an unnamed place'} has no ONNX form that fits"
                f"{' (' + '; '.join(reasons) + ')' if reasons else ''}."
            )
        self.offered.setdefault(view.operator, {}).update({form.name: None for form in accepted})
        wanted = self.choice.get(view.operator)
        picked = next((form for form in accepted if form.name == wanted), accepted[0])
        self.used.setdefault(view.operator, Counter())[picked.name] += 1
        return picked

    def _unfit(self, form: Form) -> str | None:
        if self.standard_only and not form.is_standard:
            return "it is not standard"
        return "it is for processors alone" if self.on_gpu and form.is_for_processors else None

    def _replace(self, node: ir.Node, values: object) -> None:
        import onnx_ir as ir

        new = values if isinstance(values, tuple) else (values,)
        for old, value in zip(node.outputs, new, strict=True):
            assert isinstance(value, ir.Value)
            value.shape = value.shape or old.shape
            value.type = value.type or old.type
            _take_over(old, value)
        self.model.graph.remove(node, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``, the graph's outputs included."""
    import onnx_ir as ir

    if old.is_graph_output():
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _view(node: ir.Node) -> XfNode:
    operator = load_operators()[node.op_type]
    schema = operator.overload._schema.arguments
    tensors = [argument.name for argument in schema if "Tensor" in str(argument.type)]
    given = list(node.inputs) + [None] * (len(tensors) - len(node.inputs))
    defaults = {a.name: a.default_value for a in schema if a.name not in tensors}
    attributes = {**defaults, **{name: attribute.value for name, attribute in node.attributes.items()}}
    # ONNX has no flags: they cross as integers
    flags = {a.name for a in schema if str(a.type) == "bool"}
    attributes = {name: bool(value) if name in flags else value for name, value in attributes.items()}
    path = node.metadata_props.get("path", "")
    return XfNode(operator.name, path, dict(zip(tensors, given, strict=True)), attributes, tuple(node.outputs))


def _clean_up(model: ir.Model) -> None:
    """Merge equal nodes, drop unused ones, keep residual sums apart from norms, and name nodes by their place."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    common.CommonSubexpressionEliminationPass()(model)
    _keep_residuals_apart(model.graph)
    flatten_tokens(model.graph)
    common.RemoveUnusedNodesPass()(model)
    _name_nodes(model.graph)
    model.opset_imports.clear()
    domains = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain}
    model.opset_imports.update({"": OPSET, **dict.fromkeys(sorted(domains), 1)})


def _keep_residuals_apart(graph: ir.Graph) -> None:
    """Write the Add before a norm as Sum: fused with the norm it is slower (``xf.add_layer_norm`` offers both)."""
    import onnx_ir as ir

    for norm in graph:
        add = norm.inputs[0].producer() if norm.op_type in _NORMS and norm.inputs[0] is not None else None
        if add is None or add.op_type != "Add" or add.domain or any(v.is_initializer() for v in add.inputs if v):
            continue
        total = ir.node("Sum", add.inputs, metadata_props=dict(add.metadata_props))
        graph.insert_before(add, total)
        total.outputs[0].shape, total.outputs[0].type = add.outputs[0].shape, add.outputs[0].type
        _take_over(add.outputs[0], total.outputs[0])
        graph.remove(add, safe=True)


def _name_nodes(graph: ir.Graph) -> None:
    """Name every node ``module.path/OpType``, so that a profile can be grouped by module."""
    kept = {*graph.inputs, *graph.outputs}
    seen: Counter[str] = Counter()
    for node in graph:
        label = "/".join(part for part in (node.metadata_props.pop("path", ""), node.op_type) if part)
        seen[label] += 1
        node.name = label if seen[label] == 1 else f"{label}.{seen[label]}"
        for index, value in enumerate(node.outputs):
            if value not in kept:
                value.name = f"{node.name}:{index}"
                value.shape = value.type = None
