"""Keep tokens as one matrix between linear layers: a reshape moves behind what works on each token alone.

``Gemm -> Reshape to [B, T, C] -> Gelu -> Reshape to [B * T, C] -> Gemm`` loses both reshapes, and so does a residual
stream; attention still sees ``[B, T, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["flatten_tokens"]

_UNARY = frozenset({"Gelu", "FastGelu", "QuickGelu", "Relu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Neg", "Identity"})
_ELEMENTWISE = frozenset({"Add", "Sum", "Mul", "Sub", "Div", "BiasGelu"}) | _UNARY
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


def flatten_tokens(graph: ir.Graph) -> None:
    """Rewrite a graph in place; reshapes that nothing reads any more are left for dead code elimination."""
    _Flattening(graph).run()


class _Flattening:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        # values with their tokens apart, and the same values as a matrix of tokens
        self.flat: dict[ir.Value, ir.Value] = {}
        # the shape that brings a matrix back
        self.apart: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type == "Reshape":
                self._note(node)
            elif _works_on_each_token(node):
                self._move(node)

    def _note(self, node: ir.Node) -> None:
        """Learn which values are one another's flat and unfolded forms; drop a round trip."""
        source, shape, result = node.inputs[0], node.inputs[1], node.outputs[0]
        if source is None or shape is None:
            return
        if _is_flattening(source, shape):
            if source in self.flat:
                result.replace_all_uses_with(self.flat[source])
            else:
                self.flat[source] = result
        elif _unfolds(source, result):
            self.flat[result], self.apart[result] = source, shape

    def _move(self, node: ir.Node) -> None:
        """Apply ``node`` to matrices and unfold its result, where its operands allow."""
        import onnx_ir as ir

        result = node.outputs[0]
        operands = self._matrices(node)
        shapes = [self.apart[value] for value in node.inputs if value in self.apart]
        if operands is None or not shapes or len(node.outputs) != 1 or result.is_graph_output():
            return
        place = node.metadata_props
        moved = ir.Node(node.domain, node.op_type, operands, node.attributes.values(), metadata_props=dict(place))
        unfold = ir.node("Reshape", [moved.outputs[0], shapes[0]], metadata_props=dict(place))
        self.graph.insert_before(node, [moved, unfold])
        unfolded = unfold.outputs[0]
        unfolded.shape, unfolded.type, moved.outputs[0].type = result.shape, result.type, result.type
        result.replace_all_uses_with(unfolded)
        self.graph.remove(node, safe=True)
        self.flat[unfolded], self.apart[unfolded] = moved.outputs[0], shapes[0]

    def _matrices(self, node: ir.Node) -> Sequence[ir.Value | None] | None:
        result = node.outputs[0].shape or _common_shape(node.inputs)
        operands: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None or _is_for_every_token(value):
                operands.append(value)
            # an operand that is broadcast has another shape than the result
            elif value in self.flat and result is not None and value.shape == result:
                operands.append(self.flat[value])
            else:
                return None
        node.outputs[0].shape = result
        return operands


def _works_on_each_token(node: ir.Node) -> bool:
    if node.op_type in _NORMS:
        axis = node.attributes.get("axis")
        return (axis is None or axis.as_int() == -1) and len(node.outputs) == 1
    return node.op_type in _ELEMENTWISE


def _is_for_every_token(value: ir.Value) -> bool:
    """Whether a constant has no axis but the last."""
    return value.const_value is not None and len(value.const_value.shape) <= 1


def _is_flattening(source: ir.Value, shape: ir.Value) -> bool:
    if shape.const_value is None or source.shape is None or len(source.shape) < 3:
        return False
    sizes = shape.const_value.numpy().tolist()
    return len(sizes) == 2 and sizes[0] == -1 and sizes[1] == source.shape[-1]


def _unfolds(source: ir.Value, result: ir.Value) -> bool:
    """Whether a Gemm's result gets its leading axes back, its rows staying whole."""
    gemm = source.producer()
    if gemm is None or gemm.op_type != "Gemm" or result.shape is None or len(result.shape) < 3:
        return False
    weight = gemm.inputs[1]
    is_transposed = "transB" in gemm.attributes and gemm.attributes["transB"].as_int() == 1
    known = weight.shape if weight is not None else None
    return known is not None and result.shape[-1] == known[0 if is_transposed else 1]


def _common_shape(values: Sequence[ir.Value | None]) -> ir.Shape | None:
    shapes = [value.shape for value in values if value is not None and not _is_for_every_token(value)]
    return shapes[0] if shapes and all(shape == shapes[0] for shape in shapes) else None
