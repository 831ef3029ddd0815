"""What an ONNX form of an operator is, and the builder its nodes are written with.

``kernels/<operator>/onnx.py`` lists the forms of an operator as ``FORMS``, preferred first; the last one accepts every
node.  A form may use other xf operators: what it emits with :meth:`Builder.xf` is expanded in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CONTRIB", "Builder", "Form", "ScanBody", "XfNode", "always"]

# ONNX Runtime's own operators
CONTRIB = "com.microsoft"

# a size as the builder takes it: known, copied from the input (0), inferred (-1), or a one-element tensor
SizeLike: TypeAlias = "int | ir.Value"


@dataclass(frozen=True)
class XfNode:
    """One xf operator in an ONNX graph, with its operands and attributes by the names of its schema."""

    operator: str
    path: str
    operands: Mapping[str, ir.Value | None]
    attributes: Mapping[str, Any]
    outputs: tuple[ir.Value, ...]

    def __getitem__(self, name: str) -> Any:
        """Return an operand (None where absent) or an attribute."""
        return self.operands[name] if name in self.operands else self.attributes[name]

    def size(self, name: str, axis: int) -> int:
        """Return a size of an operand that is known."""
        size = self.shape(name)[axis]
        assert isinstance(size, int)
        return size

    def shape(self, name: str) -> tuple[int | str, ...]:
        """Return the shape of an operand: sizes, and expressions in dimension names."""
        value = self.operands[name]
        assert value is not None
        assert value.shape is not None, f"{self.operator} has no shape for {name}"
        return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


# one step of a scan: (builder, states, items) -> (next states, results)
ScanBody: TypeAlias = (
    "Callable[[Builder, Sequence[ir.Value], Sequence[ir.Value]], tuple[Sequence[ir.Value], Sequence[ir.Value]]]"
)

# why a form cannot express a node, or None where it can
Verdict: TypeAlias = str | None


def always(node: XfNode) -> Verdict:
    """Accept every node."""
    return None


@dataclass(frozen=True)
class Form:
    """One way to write an operator in ONNX.

    Attributes:
        name: Name in tuning records, ``multi_head_attention``.
        build: Emits the nodes and returns the value, or the values of an operator with several outputs.
        accepts: Why the form cannot express a node, or None where it can.
        is_standard: Whether it uses ONNX's own operators only, which every runtime knows.
        is_for_processors: Whether ONNX Runtime has its operators, or those of them in float32, on processors alone.

    """

    name: str
    build: Callable[[Builder, XfNode], ir.Value | Sequence[ir.Value]]
    accepts: Callable[[XfNode], Verdict] = always
    is_standard: bool = False
    is_for_processors: bool = False


@dataclass
class Builder:
    """Emits ONNX nodes before a given node, under its module path.

    ``derived`` holds the weights computed from others (transposed, reshaped), so that every graph built from one export
    shares them; they are computed when written, not before.
    """

    graph: ir.Graph
    derived: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    pending: list[ir.Node] = field(default_factory=list)
    _before: ir.Node | None = None
    _path: str = ""
    # the builder of the graph around this one, which holds the constants
    _around: Builder | None = None

    def at(self, node: ir.Node, path: str) -> Builder:
        """Emit what follows before ``node``, under ``path``; returns self."""
        self._before, self._path = node, path
        self.pending = []
        return self

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Emit a node and return its output; inputs and attributes given as None are left out."""
        return self.ops(op_type, *inputs, domain=domain, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Emit a node with several outputs and return them."""
        import onnx_ir as ir

        operands = list(inputs)
        while operands and operands[-1] is None:
            operands.pop()
        given = {key: value for key, value in attributes.items() if value is not None}
        version = 1 if domain else None
        node = ir.node(op_type, operands, given, domain=domain, num_outputs=outputs, version=version)
        node.metadata_props["path"] = self._path
        if self._before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._before, node)
        if domain == "xf":
            self.pending.append(node)
        return tuple(node.outputs)

    def scan(
        self, body: ScanBody, states: Sequence[ir.Value], items: Sequence[ir.Value], *, axis: int
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """Emit one ``Scan`` node: ``body`` step after step along an axis, each given the states the last one left.

        Args:
            body: Given a builder, the states and the items of one step (without ``axis``), emits the step's nodes and
                returns the next states and the step's results; it may read any value around it.
            states: The first states; they have types.
            items: What is cut into steps; they have types.
            axis: The axis of the steps, in ``items`` and in the results.

        Returns:
            The last states, and the results of all steps stacked along ``axis``.

        """
        import onnx_ir as ir

        inner = self._inside()
        entries = [ir.Value(name=f"in.{i}", type=value.type) for i, value in enumerate([*states, *items])]
        inner.graph.inputs.extend(entries)
        kept, results = body(inner, entries[: len(states)], entries[len(states) :])
        leaving: list[ir.Value] = []
        for value in (*kept, *results):
            # a value goes in or out once: what the body hands through gets a node of its own
            leaving.append(inner.op("Identity", value) if value in entries or value in leaving else value)
        for value, like in zip(leaving, [*states, *(items[0] for _ in results)], strict=True):
            value.type = like.type
        inner._finish(*leaving)
        outputs = self.ops(
            "Scan",
            *states,
            *items,
            outputs=len(leaving),
            body=inner.graph,
            num_scan_inputs=len(items),
            scan_input_axes=[axis] * len(items),
            scan_output_axes=[axis] * len(results),
        )
        for value, like in zip(outputs, leaving, strict=True):
            value.type = like.type
        return list(outputs[: len(states)]), list(outputs[len(states) :])

    def collect(
        self, body: Callable[[Builder, ir.Value], ir.Value], count: ir.Value, *, like: ir.Value, axis: int
    ) -> ir.Value:
        """Emit one ``Loop``: what ``body`` makes of each number below ``count``, put end to end along an axis.

        Args:
            body: Given a builder and the number, emits the nodes of one turn and returns their result, whose size
                along ``axis`` may differ from turn to turn; it may read any value around it.
            count: How often, an int64 without axes, at least 1.
            like: Has the type of the results.
            axis: The axis along which they are joined.

        """
        import onnx_ir as ir

        inner = self._inside()
        number, goes_on, before = (ir.Value(name=f"{inner.graph.name}.in.{i}") for i in range(3))
        number.shape = goes_on.shape = ir.Shape([])
        number.type, goes_on.type = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)
        assert like.type is not None
        before.type = ir.SequenceType(like.type)
        inner.graph.inputs.extend((number, goes_on, before))
        after = inner.op("SequenceInsert", before, body(inner, number))
        going = inner.op("Identity", goes_on)
        after.type, going.type, going.shape = before.type, goes_on.type, goes_on.shape
        inner._finish(going, after)
        results = self.op("Loop", count, None, self.op("SequenceEmpty", dtype=like.dtype), body=inner.graph)
        return self.op("ConcatFromSequence", results, axis=axis)

    def either(
        self,
        condition: ir.Value,
        then: Callable[[Builder], ir.Value],
        otherwise: Callable[[Builder], ir.Value],
        *,
        like: ir.Value,
    ) -> ir.Value:
        """Emit one ``If``, whose branches return values of the type of ``like``."""
        branches = []
        for label, emit in (("then", then), ("else", otherwise)):
            branch = self._inside(label)
            value = emit(branch)
            value.type = like.type
            branch._finish(value)
            branches.append(branch.graph)
        return self.op("If", condition, then_branch=branches[0], else_branch=branches[1])

    def _inside(self, label: str = "step") -> Builder:
        """Return the builder of a graph inside this one; names in it are unlike those around it."""
        import onnx_ir as ir

        name = label if self._around is None else f"{self.graph.name}.{label}"
        return Builder(ir.Graph([], [], nodes=[], name=name), self.derived, _path=self._path, _around=self)

    def _finish(self, *leaving: ir.Value) -> None:
        """Name what the inner graph computes, and what leaves it."""
        self.graph.outputs.extend(leaving)
        for number, value in enumerate(value for node in self.graph for value in node.outputs):
            value.name = f"{self.graph.name}.{number}"

    def xf(
        self, operator: str, *inputs: ir.Value | None, like: ir.Value, width: int | None = None, **attributes: Any
    ) -> ir.Value:
        """Emit an xf operator whose result has the type and shape of ``like``, but the last axis ``width``."""
        import onnx_ir as ir

        value = self.op(operator, *inputs, domain="xf", **attributes)
        assert like.shape is not None
        sizes = list(like.shape) if width is None else [*list(like.shape)[:-1], width]
        value.shape, value.type = ir.Shape(sizes), like.type
        return value

    def constant(self, value: Any, dtype: Any = None) -> ir.Value:
        """Return a small constant; equal constants are one initializer."""
        import onnx_ir as ir

        if self._around is not None:
            return self._around.constant(value, dtype)
        array = np.asarray(value, dtype=dtype)
        if dtype is None and array.dtype == np.float64:
            array = array.astype(np.float32)
        few = "_".join(map(str, array.reshape(-1).tolist()))
        label = few if array.size <= 8 else hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()
        name = f"constant.{array.dtype}.{'x'.join(map(str, array.shape))}.{label}"
        return self.graph.initializers.get(name) or self._initializer(name, ir.tensor(array))

    def scalar(self, value: float, like: ir.Value) -> ir.Value:
        """Return a floating-point constant without axes in the type of ``like``."""
        assert like.dtype is not None
        return self.constant(value, like.dtype.numpy())

    def derive(
        self, source: ir.Value, label: str, shape: Sequence[int], function: Callable[[np.ndarray], np.ndarray]
    ) -> ir.Value | None:
        """Return the initializer ``function(source)``, or None when ``source`` is not a constant."""
        import onnx_ir as ir

        tensor = source.const_value
        if tensor is None or not source.is_initializer():
            return None
        name = f"{source.name}.{label}"
        if name not in self.derived:
            self.derived[name] = ir.LazyTensor(
                lambda: ir.tensor(np.array(function(tensor.numpy()), order="C"), dtype=tensor.dtype),
                dtype=tensor.dtype,
                shape=ir.Shape(shape),
                name=name,
            )
        return self.graph.initializers.get(name) or self._initializer(name, self.derived[name])

    def transposed(self, matrix: ir.Value) -> ir.Value:
        """Return the transpose of a matrix: of a constant beforehand, of anything else at run time."""
        rows, columns = matrix.shape or (None, None)
        if isinstance(rows, int) and isinstance(columns, int):
            constant = self.derive(matrix, "transposed", (columns, rows), lambda array: array.T)
            if constant is not None:
                return constant
        return self.op("Transpose", matrix, perm=[1, 0])

    def reshape(self, value: ir.Value, *sizes: SizeLike) -> ir.Value:
        """Reshape; a size is a number, 0 (as before at that place), -1 (inferred) or a one-element tensor."""
        known = [self._known(size) for size in sizes]
        if None not in known:
            shape = self.constant(known, np.int64)
        else:
            parts = [self.constant([size], np.int64) if isinstance(size, int) else size for size in sizes]
            shape = self.op("Concat", *parts, axis=0)
        return self.op("Reshape", value, shape)

    @staticmethod
    def _known(size: SizeLike) -> int | None:
        if isinstance(size, int):
            return size
        return None if size.const_value is None else int(size.const_value.numpy().item())

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return one size of a value as a one-element tensor: a constant or an input's size where that is known."""
        known = value.shape[axis] if value.shape is not None else None
        if isinstance(known, int):
            return self.constant([known], np.int64)
        for given in self.graph.inputs:
            for place, size in enumerate(given.shape or ()):
                if known is not None and size == known:
                    return self.op("Shape", given, start=place, end=place + 1)
        return self.op("Shape", value, start=axis, end=axis + 1)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        import onnx_ir as ir

        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        self.graph.initializers[name] = value
        return value
