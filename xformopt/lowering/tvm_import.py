"""A traced graph -> TVM's IRModule: xf operators by their kernels, ATen operators by TVM's own importer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from xformopt.errors import LoweringError
from xformopt.kernels.definition import find_operator
from xformopt.kernels.tvm_form import Builder, Machine, Tile, Trial, TvmNode
from xformopt.lowering.tvm_operators import further_operators
from xformopt.lowering.tvm_trace import Origin, Traced, arguments_of, kernel_of, origin_of
from xformopt.program.text import target_name

__all__ = ["Imported", "import_traced"]


@dataclass(frozen=True)
class Imported:
    """A module with one function for each graph.

    Attributes:
        module: TVM's IRModule.
        parameters: What each function takes after the inputs, in order, by its name.
        kernels: How many nodes of each xf operator became a kernel, in each function.
        trials: The functions that have a choice of tiles.

    """

    module: Any
    parameters: dict[str, tuple[np.ndarray, ...]]
    kernels: dict[str, int]
    trials: Mapping[str, Trial]


def import_traced(graphs: Mapping[str, Traced], machine: Machine, tiles: Mapping[str, Tile] | None = None) -> Imported:
    """Build the module of graphs by the names of their functions, which are one program at several sizes.

    Kernels take ``tiles`` where there is one for them, and defaults for ``machine`` elsewhere.

    Raises:
        LoweringError: TVM knows no form of an ATen operator.

    """
    from tvm import relax

    blocks = relax.BlockBuilder()
    parameters, trials = {}, {}
    kernels: dict[str, int] = {}
    for name, traced in graphs.items():
        parameters[name], builder, kernels = _import_one(blocks, name, traced, machine, tiles or {})
        trials.update(builder.trials)
    return Imported(blocks.get(), parameters, kernels, trials)


def _import_one(
    blocks: Any, name: str, traced: Traced, machine: Machine, tiles: Mapping[str, Tile]
) -> tuple[tuple[np.ndarray, ...], Builder, dict[str, int]]:
    """Add one function to the module that ``blocks`` builds."""
    from tvm import relax
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    importer = ExportedProgramImporter()
    importer.block_builder = blocks
    environment = importer.env = _Environment(traced)
    known = {**importer.convert_map, **further_operators(blocks, environment.__getitem__)}
    _check_known(traced, known)
    inputs = [environment.variable(node) for node in traced.inputs]
    builder = Builder(machine, blocks, environment.__getitem__, traced.parameters, tiles)
    kernels: dict[str, int] = {}
    with blocks.function(name):
        with blocks.dataflow():
            for node in traced.graph.nodes:
                if node.op != "call_function":
                    continue
                operator = find_operator(node.target)
                if operator is None:
                    environment[node] = known[_name_of(node)](node)
                    continue
                kernel = kernel_of(operator.name)
                assert kernel is not None
                first, *others = _shapes_of(node)
                arguments = arguments_of(operator, node.args, node.kwargs)
                environment[node] = kernel.emit(builder, TvmNode(operator.name, arguments, first, tuple(others)))
                kernels[operator.name] = kernels.get(operator.name, 0) + 1
            outputs = traced.graph.output_node().args[0]
            assert isinstance(outputs, tuple)
            results = [environment[node] for node in outputs if isinstance(node, fx.Node)]
            result = blocks.emit_output(relax.Tuple(results))
        taken = [*environment.taken, *builder.packed.values()]
        blocks.emit_func_output(result, params=[*inputs, *(variable for variable, _ in taken)])
    return tuple(array for _, array in taken), builder, kernels


def _shapes_of(node: fx.Node) -> list[tuple[int, ...]]:
    value = node.meta["val"]
    values = value if isinstance(value, tuple) else (value,)
    return [tuple(int(size) for size in each.shape) for each in values]


def _check_known(traced: Traced, known: Any) -> None:
    for node in traced.graph.nodes:
        if node.op == "call_function" and find_operator(node.target) is None and _name_of(node) not in known:
            raise LoweringError(_unknown(target_name(node.target), origin_of(node)))


def _unknown(operator: str, origin: Origin | None) -> str:
    """Say which operator TVM does not know, where it is, and what avoids it."""
    where = f" at {origin.path}" if origin is not None and origin.path else ""
    part = f", a step of {origin.operator}" if origin is not None and origin.operator not in ("", operator) else ""
    from_pass = ", or leave out the pass that makes it" if part.startswith(", a step of xf.") else ""
    return f"TVM has no form of {operator}{part}{where}. Lower the program for ort-cpu{from_pass}."


def _name_of(node: fx.Node) -> str:
    """Return the operator's name as TVM's importer spells it, ``add.Tensor``."""
    return str(getattr(node.target, "__name__", node.target))


class _Environment(dict[fx.Node, Any]):
    """Values by node; a parameter becomes one of the function's own when it is first read.

    So parameters that kernels pack are not stored a second time as they were.
    """

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self._constants = traced.parameters
        self.taken: list[tuple[Any, np.ndarray]] = []

    def __missing__(self, node: fx.Node) -> Any:
        constant = self._constants[node]
        variable = self.variable(node)
        self.taken.append((variable, _array(constant)))
        return variable

    def get(self, node: Any, default: Any = None) -> Any:
        """Return what ``[node]`` returns for nodes; None stands for an operand that is left out."""
        return self[node] if isinstance(node, fx.Node) else default

    def variable(self, node: fx.Node) -> Any:
        """Return a new variable of the node's shape and dtype, and remember it as its value."""
        from tvm import relax

        value = self._constants[node] if node in self._constants else node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        self[node] = relax.Var(node.name, relax.TensorType([int(size) for size in value.shape], dtype))
        return self[node]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()
