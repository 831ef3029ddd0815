"""torch module -> captured Program: export, flatten, name, and infer every shape anew in named dimensions."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xformopt.capture.dynamic import Axes, DynamicSpec, enlarge, resolve_axes
from xformopt.capture.failures import explain_export_failure
from xformopt.errors import CaptureError
from xformopt.program import Dim, Dims, Input, Level, Output, Program, infer_value

__all__ = ["capture_exported", "capture_module"]

# checks and annotations that compute nothing; the Program's own specs say what they said
_NO_COMPUTATION = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_check",
)
_TRANSPARENT_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def capture_module(
    model: torch.nn.Module,
    example_inputs: object,
    dynamic: DynamicSpec | None = None,
    *,
    output_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Program:
    """Capture ``model`` (put in evaluation mode) as a Program.

    Args:
        model: Any torch module that ``torch.export`` can trace.
        example_inputs: A dict by parameter name of ``forward``, a tuple in its order, or a single tensor.
        dynamic: Names of varying axes, ``{"input_ids": {0: "batch", 1: ("length", 1, 512)}}``; the same name is the
            same dimension.  None: batch, and length of integer inputs.  ``{}``: everything fixed.
        output_names: Names of the flattened outputs; None: dictionary keys, fields, or ``output_0`` ....
        name: Name of the Program; None: the module's class.

    Raises:
        CaptureError: with one paragraph that names the module and line that cannot be captured, and what to change.

    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        examples = bind_examples(model, example_inputs)
        axes = resolve_axes(examples, dynamic)
        traced = enlarge(examples, axes)
        with torch.no_grad(), _plain_modules():
            exported = _export(model, traced, axes)
            names = list(output_names or name_outputs(_forward(model, traced)))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return capture_exported(exported, axes, names, examples, name or type(model).__name__)


def bind_examples(model: torch.nn.Module, example_inputs: object) -> dict[str, torch.Tensor]:
    """Return example inputs by the parameter names of ``model.forward``, in its order."""
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Sequence):
        positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(example_inputs) > len(positional):
            raise CaptureError(
                f"{len(example_inputs)} example inputs were given, but {type(model).__name__}.forward takes "
                f"{len(positional)} ({', '.join(positional)}). Pass a dict by parameter name."
            )
        example_inputs = dict(zip(positional, example_inputs, strict=False))
    if not isinstance(example_inputs, Mapping):
        raise CaptureError(
            f"Example inputs must be a dict of tensors by forward parameter, a tuple or a tensor, "
            f"not {type(example_inputs).__name__}."
        )
    given = {key: value for key, value in example_inputs.items() if value is not None}
    if not given:
        raise CaptureError("Example inputs are empty: give at least one tensor for the model's forward.")
    for key, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"The example input {key!r} is {type(value).__name__}, not a tensor: inputs of a Program are tensors. "
                f"Wrap the module in one whose forward takes only tensors."
            )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown := [key for key in given if key not in parameters and not takes_any]:
        raise CaptureError(
            f"{type(model).__name__}.forward has no parameter {unknown[0]!r}; it takes {', '.join(parameters)}."
        )
    order = [key for key in parameters if key in given] + [key for key in given if key not in parameters]
    return {key: given[key].detach() for key in order}


@contextmanager
def _plain_modules() -> Iterator[None]:
    # the fused encoder path is one opaque operator, which no pass could look into
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            # caches that a module fills while it runs
            warnings.filterwarnings("ignore", message=".*assigned during export")
            # torch's exporter copies what torch itself deprecates
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _export(model: torch.nn.Module, examples: dict[str, torch.Tensor], axes: Axes) -> torch.export.ExportedProgram:
    shapes = {
        name: {axis: torch.export.Dim.AUTO for axis in range(value.dim()) if (name, axis) in axes.named} or None
        for name, value in examples.items()
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    unnamed = [n for n in examples if n not in inspect.signature(model.forward).parameters]
    dynamic_shapes: Any = shapes
    if takes_any and unnamed:
        dynamic_shapes = {
            **{n: s for n, s in shapes.items() if n not in unnamed},
            "kwargs": {n: shapes[n] for n in unnamed},
        }
    try:
        # torch prints the part of the graph it has when it gives up; the error says more in one paragraph
        with redirect_stderr(io.StringIO()):
            exported = torch.export.export(model, (), dict(examples), dynamic_shapes=dynamic_shapes, strict=False)
        plain: torch.export.ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        raise CaptureError(explain_export_failure(model, error)) from error
    return plain


def _forward(model: torch.nn.Module, examples: dict[str, torch.Tensor]) -> object:
    try:
        return model(**examples)
    except Exception as error:
        raise CaptureError(explain_export_failure(model, error)) from error


def name_outputs(outputs: object) -> list[str]:
    """Name the tensors of a module's return value by its keys or fields, else ``output_0`` and so on."""
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    names: list[str] = []
    for path, leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            if leaf is None:
                continue
            raise CaptureError(
                f"The model returns {type(leaf).__name__} at {pytree.keystr(path) or 'the top'}: "
                f"a Program returns tensors only. Wrap the module in one that drops it."
            )
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        label = "_".join(part for part in parts if part)
        names.append(label if label and not label[0].isdigit() else f"output_{label or len(names)}")
    return names


def capture_exported(
    exported: torch.export.ExportedProgram,
    axes: Axes | None,
    output_names: Sequence[str] | None,
    examples: Mapping[str, torch.Tensor] | None,
    name: str,
) -> Program:
    """Turn an ExportedProgram into a captured Program; without ``axes`` its own symbols name the dimensions."""
    if mutated := {**exported.graph_signature.buffers_to_mutate, **exported.graph_signature.user_inputs_to_mutate}:
        raise CaptureError(
            f"The model writes to {next(iter(mutated.values()))!r} while it runs; a Program is functional. "
            f"Return the new value as an output instead of assigning it."
        )
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    dims, shapes = _name_dimensions(exported, module, axes)
    builder = _Builder(module, dims, shapes)
    program = builder.build(name, output_names, examples)
    if fixed := dims.specialized():
        dim, value = next(iter(fixed.items()))
        raise CaptureError(
            f"The dimension {dim!r} cannot vary: the model's shapes force it to be {value}. "
            f"Leave it out of `dynamic`, or remove the constant from the model's reshape or view."
        )
    return program


def _name_dimensions(
    exported: torch.export.ExportedProgram, module: fx.GraphModule, axes: Axes | None
) -> tuple[Dims, dict[str, tuple[int | str, ...]]]:
    """Give every symbolic input size a name: the hinted one, or one for its symbol."""
    ranges = {str(symbol): bounds for symbol, bounds in exported.range_constraints.items()}
    shapes: dict[str, tuple[int | str, ...]] = {}
    dims: dict[str, Dim] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"The input {node.target} is not a tensor; a Program takes tensors only.")
        sizes: list[int | str] = []
        traced: tuple[int | torch.SymInt, ...] = tuple(value.shape)
        for axis, size in enumerate(traced):
            hinted = axes.named.get((str(node.target), axis)) if axes else None
            if isinstance(size, int):
                if hinted and axes and axes.stated:
                    raise CaptureError(
                        f"The dimension {hinted!r} (axis {axis} of {node.target}) cannot vary: the model's code fixes "
                        f"it to {size}. Leave it out of `dynamic`, or make the code read the size from its input."
                    )
                sizes.append(size)
                continue
            label = hinted or _symbol_name(str(size.node.expr), len(dims))
            bounds = ranges.get(str(size.node.expr))
            sizes.append(label)
            dims[label] = _narrow(dims.get(label) or (axes and axes.dims.get(label)) or Dim(label), bounds)
        shapes[str(node.target)] = tuple(sizes)
    return Dims(dims.values()), shapes


def _symbol_name(expression: str, count: int) -> str:
    return expression if expression.isidentifier() else f"dim_{count}"


def _narrow(dim: Dim, bounds: Any) -> Dim:
    if bounds is None:
        return dim
    # torch.export never looks at sizes 0 and 1, so its lower bound of 2 says nothing
    low = int(bounds.lower) if bounds.lower.is_Integer and bounds.lower > 2 else dim.low
    high = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
    highs = [h for h in (high, dim.high) if h is not None]
    return Dim(dim.name, max(low, dim.low), min(highs) if highs else None)


class _Builder:
    """Copies a graph module into a Program, inlining wrappers and inferring every value anew."""

    def __init__(self, module: fx.GraphModule, dims: Dims, shapes: dict[str, tuple[int | str, ...]]) -> None:
        self.module = module
        self.shapes = shapes
        self.program = Program(fx.Graph(), {}, (), (), dims, Level.CAPTURED)
        self.owners: dict[tuple[Any, ...], fx.Node] = {}

    def build(
        self, name: str, output_names: Sequence[str] | None, examples: Mapping[str, torch.Tensor] | None
    ) -> Program:
        program = self.program
        program.name = name
        results = self._copy(self.module, {})
        leaves = [value for value in pytree.tree_leaves(results) if value is not None]
        for value in leaves:
            if not isinstance(value, fx.Node):
                raise CaptureError(f"The model returns the constant {value!r}; a Program returns tensors only.")
        names = list(output_names or [f"output_{i}" for i in range(len(leaves))])
        if len(names) != len(leaves):
            raise CaptureError(f"{len(names)} output names were given for {len(leaves)} outputs.")
        program.graph.output(tuple(leaves))
        program.outputs = tuple(Output(label) for label in names)
        program.inputs = tuple(self._spec(spec) for spec in program.inputs)
        if examples is not None:
            program.example_inputs = {label: examples[label] for label in program.input_names}
        program.drop_unused()
        program.outputs = mark_valid(program)
        return program

    def _copy(self, module: fx.GraphModule, known: dict[fx.Node, Any]) -> Any:
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], known.__getitem__)
            if node in known:
                continue
            known[node] = self._copy_node(module, node, known)
        raise AssertionError("a graph has an output node")

    def _copy_node(self, module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self._input(str(node.target), node.meta["val"].dtype)
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(module)
            return self._parameter(str(node.target), value) if isinstance(value, torch.Tensor) else value
        if node.op == "call_module":
            raise CaptureError(f"The export left a call of the module {node.target}, which a Program cannot hold.")
        kind = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        if kind in _NO_COMPUTATION:
            return None
        args = fx.map_arg(node.args, known.__getitem__)
        kwargs = fx.map_arg(node.kwargs, known.__getitem__)
        if kind in _TRANSPARENT_WRAPPERS:
            return self._inline(kind, args)
        if kind == "pad" and (len(args) < 3 or args[2] == "constant"):
            return self._pad(node, args)
        if kind == "baddbmm":
            return self._add_product(node, args, kwargs)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"The model uses {kind} at {_module_path(node) or 'its top level'}: control flow inside the graph is "
                f"not supported. Replace it by tensor operations such as torch.where."
            )
        return self._create(node, node.target, args, kwargs)

    def _create(self, source: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        created = self.program.graph.create_node("call_function", target, args, kwargs, name=source.name)
        created.meta["val"] = self._infer(created, source)
        created.meta["path"] = _module_path(source)
        return created

    def _pad(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        # aten.pad asks for concrete sizes when it is inferred; constant_pad_nd says the same without asking
        amounts = args[1]
        if all(isinstance(amount, int) and amount == 0 for amount in amounts):
            return args[0]
        value = args[3] if len(args) > 3 and args[3] is not None else 0
        return self._create(node, torch.ops.aten.constant_pad_nd.default, (args[0], amounts, value), {})

    def _add_product(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        # baddbmm cannot be inferred where its first operand broadcasts over sizes that vary
        product, total = self._create(node, torch.ops.aten.bmm.default, args[1:3], {}), args[0]
        times = torch.ops.aten.mul.Tensor
        product = self._create(node, times, (product, kwargs.get("alpha", 1)), {})
        total = self._create(node, times, (total, kwargs.get("beta", 1)), {})
        return self._create(node, torch.ops.aten.add.Tensor, (total, product), {})

    def _infer(self, created: fx.Node, source: fx.Node) -> Any:
        try:
            return infer_value(self.program, created)
        except Exception as error:
            raise CaptureError(
                f"The shapes of {source.target} at {_module_path(source) or 'the top level'} do not hold for every "
                f"size of {', '.join(map(str, self.program.dims))}: {error}"
            ) from error

    def _inline(self, kind: str, args: tuple[Any, ...]) -> Any:
        position = next(i for i, value in enumerate(args) if isinstance(value, fx.GraphModule))
        if kind == "wrap_with_autocast" and args[2]:
            raise CaptureError(
                "The model turns autocast on inside its forward; capture it in the precision you want instead."
            )
        inner = args[position]
        placeholders = inner.graph.find_nodes(op="placeholder")
        known = dict(zip(placeholders, args[position + 1 :], strict=True))
        return self._copy(inner, known)

    def _input(self, name: str, dtype: torch.dtype) -> fx.Node:
        node = self.program.graph.placeholder(name)
        node.meta["val"] = self.program.dims.fake(self.shapes[name], dtype)
        self.program.inputs += (Input(name, dtype, self.shapes[name]),)
        return node

    def _parameter(self, name: str, value: torch.Tensor) -> fx.Node:
        value = value.detach()
        # tied weights are one parameter, under the name that comes first
        owner = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and owner in self.owners:
            return self.owners[owner]
        node = self.program.graph.get_attr(name)
        node.meta["val"] = self.program.dims.fake(tuple(value.shape), value.dtype)
        self.program.parameters[name] = value
        self.owners[owner] = node
        return node

    def _spec(self, spec: Input) -> Input:
        """Bound an integer input by the smallest embedding table it indexes."""
        if spec.dtype.is_floating_point or spec.dtype == torch.bool:
            return spec
        node = next(n for n in self.program.graph.find_nodes(op="placeholder") if n.target == spec.name)
        rows = [
            user.args[0].meta["val"].shape[0]
            for user in node.users
            if getattr(user.target, "_opname", "") == "embedding" and user.args[1] is node
        ]
        return Input(spec.name, spec.dtype, spec.shape, min(rows) if rows else None)


def mark_valid(program: Program) -> tuple[Output, ...]:
    """Tie each output that varies with batch and length to the padding mask of the same shape, if there is one."""
    masks = [s for s in program.inputs if "mask" in s.name and len(s.shape) == 2 and not isinstance(s.shape[1], int)]
    marked = []
    for output, node in zip(program.outputs, program.results, strict=True):
        shape = tuple(map(str, program.dims.shape(node.meta["val"])))
        mask = next((m for m in masks if shape[:2] == tuple(map(str, m.shape))), None)
        means = "padding" if mask and "padding" in mask.name else "keep"
        marked.append(Output(output.name, mask.name if mask else None, means))
    return tuple(marked)


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    # size reads that torch.export adds carry a placeholder for a path
    return "" if path.startswith("_empty_nn_module_stack") else path
