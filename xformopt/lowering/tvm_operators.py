"""ATen operators that TVM's importer does not know, or not for every type, in operators that TVM has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["further_operators"]

Convert = Callable[[fx.Node], Any]


def further_operators(block_builder: Any, value: Callable[[Any], Any]) -> dict[str, Convert]:
    """Return what emits a node, by the operator's name; ``value`` returns TVM's value of a node."""
    from tvm import relax

    def emit(result: Any) -> Any:
        return block_builder.emit(result)

    def reduced(function: Callable[..., Any]) -> Convert:
        def convert(node: fx.Node) -> Any:
            x, *rest = node.args
            axes = rest[0] if rest and rest[0] else None
            keeps = bool(rest[1]) if len(rest) > 1 else bool(node.kwargs.get("keepdim", False))
            return emit(function(value(x), axes, keeps))

        return convert

    def elementwise(function: Callable[[Any, Any], Any]) -> Convert:
        def convert(node: fx.Node) -> Any:
            left, right = node.args
            first = value(left)
            second = value(right) if isinstance(right, fx.Node) else relax.const(right, first.ty.dtype)
            return emit(function(first, second))

        return convert

    def clamp(node: fx.Node) -> Any:
        # of the importer's own, a bound that is left out becomes infinity, which integers have not
        bounds = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
        result = value(node.args[0])
        for name, function in (("min", relax.op.maximum), ("max", relax.op.minimum)):
            if (bound := bounds.get(name)) is not None:
                result = emit(function(result, relax.const(bound, result.ty.dtype)))
        return result

    found = {"clamp.default": clamp, "amax.default": reduced(relax.op.max), "amin.default": reduced(relax.op.min)}
    for name, function in (("__lshift__", relax.op.left_shift), ("__rshift__", relax.op.right_shift)):
        found |= {f"{name}.{kind}": elementwise(function) for kind in ("Tensor", "Scalar")}
    return found
