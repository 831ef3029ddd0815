"""Program -> a graph of fixed sizes: ATen operators, and the xf operators that have a TVM kernel."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from xformopt.errors import LoweringError
from xformopt.kernels.definition import Operator, find_operator
from xformopt.kernels.tvm_form import Kernel
from xformopt.program import Program, path_of
from xformopt.program.interpret import call
from xformopt.program.text import target_name

__all__ = ["Origin", "Traced", "arguments_of", "kernel_of", "origin_of", "trace"]

# what torch copies from a node to those that it is traced to
_CARRIED = "custom"


@dataclass(frozen=True)
class Traced:
    """A graph whose placeholders are the Program's inputs, then its parameters.

    Attributes:
        graph: Every node has a fake tensor of fixed shape in ``meta["val"]``; one tuple is returned.
        inputs: The placeholders of the inputs, in order.
        parameters: The tensors of the other placeholders.

    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    parameters: dict[fx.Node, torch.Tensor]


@dataclass(frozen=True)
class Origin:
    """The node of the Program that a traced node comes from: its operator, and the module it was in."""

    operator: str
    path: str


def origin_of(node: fx.Node) -> Origin | None:
    """Return where a traced node comes from; None for what tracing itself made."""
    found: Origin | None = node.meta.get(_CARRIED, {}).get("origin")
    return found


@cache
def kernel_of(operator: str) -> Kernel | None:
    """Return the TVM kernel of an xf operator, or None where it has none."""
    name = f"xformopt.kernels.{operator}.tvm"
    if importlib.util.find_spec(name) is None:
        return None
    kernel: Kernel = importlib.import_module(name).KERNEL
    return kernel


def arguments_of(operator: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of the schema, defaults filled in."""
    schema = operator.overload._schema.arguments
    named = {argument.name: argument.default_value for argument in schema}
    named.update(zip((argument.name for argument in schema), args, strict=False))
    return {**named, **kwargs}


def trace(program: Program, inputs: Mapping[str, torch.Tensor]) -> Traced:
    """Trace ``program`` at the sizes of ``inputs``.

    Raises:
        LoweringError: an operator decides by values what it computes, so that it has no graph.

    """
    names = list(program.parameters)
    given = [inputs[name] for name in program.input_names]

    def run(*values: torch.Tensor) -> Any:
        parameters = dict(zip(names, values[len(given) :], strict=True))
        return _Expansion(program.copy().graph, parameters).run(*values[: len(given)])

    tensors = [*given, *program.parameters.values()]
    with torch.no_grad(), fx.traceback.preserve_node_meta():
        # the table is typed by the base class of operators
        table: Any = core_aten_decompositions()
        traced = make_fx(run, decomposition_table=table, tracing_mode="fake")(*tensors)
    traced.graph.eliminate_dead_code()
    placeholders = traced.graph.find_nodes(op="placeholder")
    parameters = dict(zip(placeholders[len(given) :], program.parameters.values(), strict=True))
    for node in traced.graph.find_nodes(op="get_attr"):
        # constants that operators make on the way, such as a mask's minus infinity
        parameters[node] = getattr(traced, str(node.target))
    return Traced(traced.graph, tuple(placeholders[: len(given)]), parameters)


class _Expansion(fx.Interpreter):
    """Runs a Program's graph; an xf operator that no kernel takes runs as the ATen operators of its reference."""

    def __init__(self, graph: fx.Graph, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self._parameters = parameters

    def run_node(self, n: fx.Node) -> Any:
        n.meta[_CARRIED] = {"origin": Origin(target_name(n.target) if callable(n.target) else "", path_of(n))}
        try:
            return super().run_node(n)
        except Exception as error:
            where = path_of(n) or "an unnamed place"
            raise LoweringError(
                f"{n.target} at {where} has no graph of fixed size for TVM: {str(error).strip().splitlines()[0]} "
                f"Lower the program for ort-cpu."
            ) from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return self._parameters[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        operator = find_operator(target)
        if operator is None:
            return call(target, args, kwargs)
        kernel = kernel_of(operator.name)
        if kernel is not None and kernel.accepts(arguments_of(operator, args, kwargs)) is None:
            return target(*args, **kwargs)
        return operator.reference(*args, **kwargs)
