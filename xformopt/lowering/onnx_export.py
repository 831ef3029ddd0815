"""Program -> ONNX graph: torch translates what is plain ATen, xf operators cross as opaque nodes of the domain xf."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from xformopt.errors import LoweringError, MissingExtraError
from xformopt.kernels.definition import load_operators
from xformopt.lowering.program_export import explain, export_program, without_warnings
from xformopt.program import Program, path_of
from xformopt.program.text import target_name

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "Exported", "export_onnx", "require_onnx"]

# operators torch translates well but xformopt has better forms for, with the xf operator of the same arguments
_SAME_AS = {torch.ops.aten.linear.default: "linear"}
# torch's own forms of attention and rotary embeddings at later versions fail in ONNX Runtime (a mask or angles that are
# broadcast); what torch emits at this version means the same at ``OPSET``
_TRANSLATED_OPSET = 20
# the first with Attention, RMSNormalization and RotaryEmbedding, which forms use
OPSET = 23


@dataclass(frozen=True)
class Exported:
    """One export of a Program: a graph with xf nodes, from which every choice of forms is built.

    Nodes carry their module path in ``metadata_props["path"]``; weights are the Program's own tensors.  ``derived``
    holds what forms compute from weights, shared by all graphs.
    """

    model: ir.Model
    program: Program
    derived: dict[str, ir.TensorProtocol] = field(default_factory=dict)


def require_onnx(purpose: str) -> None:
    """Raise MissingExtraError unless the packages that write ONNX are installed."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "ort", purpose) from error


def export_onnx(program: Program) -> Exported:
    """Export ``program`` once.

    Raises:
        LoweringError: an ATen operator has no ONNX translation, or a dimension that must vary cannot.
        MissingExtraError: onnx or onnxscript is not installed.

    """
    require_onnx("Writing ONNX")
    exported = export_program(program, "ONNX")
    with _quiet():
        try:
            result = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=_TRANSLATED_OPSET,
                custom_translation_table=_translations(),
                optimize=True,
                verbose=False,
            )
        except Exception as error:
            raise LoweringError(_explain(program, error)) from error
    assert result is not None
    model = result.model
    _clean(model, program)
    return Exported(model, program)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    operators = load_operators()
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        operator.overload: _opaque(name, len(operator.overload._schema.returns)) for name, operator in operators.items()
    }
    for target, name in _SAME_AS.items():
        table[target] = _opaque(name, 1)
    return table


def _opaque(name: str, outputs: int) -> Callable[..., Any]:
    """Return a translation that emits one node of the domain ``xf``."""

    def translate(*operands: Any, **attributes: Any) -> Any:
        import onnx_ir as ir
        from onnxscript import evaluator

        node = ir.node(name, operands, attributes, domain="xf", num_outputs=outputs, version=1)
        evaluator.default().nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    return translate


def _clean(model: ir.Model, program: Program) -> None:
    """Name inputs, outputs, dimensions and weights as the Program does, and keep only the path of each node."""
    graph = model.graph
    symbols: dict[str, str] = {}
    for spec, value in zip(program.inputs, graph.inputs, strict=True):
        value.name = spec.name
        for want, have in zip(spec.shape, value.shape or (), strict=True):
            if isinstance(want, str):
                _check_varies(want, have)
                symbols[str(have)] = want
    for name in list(graph.initializers):
        if name.startswith("graph_module."):
            value = graph.initializers.pop(name)
            value.name = name.removeprefix("graph_module.")
            if value.name in (*program.input_names, *program.output_names):
                value.name = f"{value.name}.weight"
            graph.initializers[value.name] = value
    for value in [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)]:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = _renamed(value.shape, symbols)
    for node in graph:
        traced = node.meta.get("node")
        custom = traced.meta.get("custom") or {} if traced is not None else {}
        node.metadata_props.clear()
        node.meta.clear()
        node.metadata_props["path"] = str(custom.get("path", ""))
    graph.metadata_props.clear()
    graph.name = program.name
    _name_outputs(graph, program)


def _check_varies(name: str, size: object) -> None:
    if isinstance(size, int):
        raise LoweringError(
            f"The dimension {name!r} cannot vary in ONNX: the trace fixed it to {size}. "
            f"Give it a range in which it does not change what the program does, or leave it out of `dynamic`."
        )


def _renamed(shape: ir.Shape, symbols: dict[str, str]) -> ir.Shape:
    import onnx_ir as ir

    def rename(size: int | ir.SymbolicDim) -> int | str:
        return size if isinstance(size, int) else re.sub(r"\w+", lambda m: symbols.get(m[0], m[0]), str(size))

    return ir.Shape([rename(size) for size in shape])


def _name_outputs(graph: ir.Graph, program: Program) -> None:
    """Give the outputs their names; one that is an input, a weight or another output gets a node of its own."""
    import onnx_ir as ir

    if clash := set(program.output_names) & set(program.input_names):
        raise LoweringError(
            f"The program {program.name!r} has an input and an output named {min(clash)!r}, which ONNX cannot tell "
            f"apart. Rename the output when capturing (output_names=...)."
        )
    taken: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(list(graph.outputs)):
        if value in taken:
            node = ir.node("Identity", [value], metadata_props={"path": ""})
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            value = graph.outputs[index] = node.outputs[0]
        taken.add(value)
    for name, value in zip(program.output_names, graph.outputs, strict=True):
        value.name = name


def _explain(program: Program, error: BaseException) -> str:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", "\n".join(chain))
    if not found:
        return f"The program {program.name!r} could not be written as ONNX: {explain(chain[-1])}"
    name = found[1] if found[2] == "default" else f"{found[1]}.{found[2]}"
    places = _places_of(program, name)
    where = f", used in {', '.join(places[:3])}{' and elsewhere' if len(places) > 3 else ''}," if places else ""
    return (
        f"The operator {name}{where} has no ONNX translation, so the program {program.name!r} cannot be lowered to "
        f"ONNX Runtime. Replace it in the model by operators that have one, or use the target eager or inductor."
    )


def _places_of(program: Program, name: str) -> list[str]:
    """Return where an operator is used, or one that decomposes into it: that one bears its name in its own."""
    used = [(target_name(node.target), path_of(node) or f"%{node.name}") for node in program.nodes()]
    exact = [path for target, path in used if target == name]
    return list(dict.fromkeys(exact or [path for target, path in used if name.split(".")[1] in target]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about optional packages and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with without_warnings():
            yield
    finally:
        logger.setLevel(level)
