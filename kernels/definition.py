"""What an operator of the xf dialect is, and how it becomes a torch operator.

An operator lives in ``kernels/<operator>/``: ``reference.py`` defines it in readable torch, ``operator.py`` gives its
schema, shape rule and FLOPs as one :class:`Operator`.  Execution, gradients (the vjp of the reference) and shape
propagation follow from that; nothing is registered until :func:`load_operators` is called.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

import xformopt.kernels

__all__ = ["Operator", "find_operator", "load_operators", "xf"]

_LIBRARY = torch.library.Library("xf", "DEF")


@dataclass(frozen=True)
class Operator:
    """The definition of one operator.

    Attributes:
        name: Name in the dialect, ``attention`` for ``xf.attention``.
        schema: Torch schema without the name, ``(Tensor x, Tensor weight) -> Tensor``.
        reference: The definition, on real tensors; differentiable.
        infer: The shape rule: same arguments on fake tensors, returns empty tensors.
        flops: Floating-point operations, one multiply-add = 2, from (fake or real) arguments; may be symbolic.
        level: ``lifted`` where a paper would draw one box, ``target`` for fused, packed and quantized forms.
        has_data_sizes: Whether the result has sizes that depend on data (at most the first operand's elements).
        needs_float32: Whether 16 bits ruin it: decays are multiplied over thousands of steps, and 0.999 would be 1.

    """

    name: str
    schema: str
    reference: Callable[..., Any]
    infer: Callable[..., Any]
    flops: Callable[..., Any]
    level: Literal["lifted", "target"] = "lifted"
    has_data_sizes: bool = False
    needs_float32: bool = False

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered torch operator."""
        load_operators()
        overload: torch._ops.OpOverload = getattr(torch.ops.xf, self.name).default
        return overload


@cache
def load_operators() -> dict[str, Operator]:
    """Register every operator under ``kernels/`` with torch and return them by name."""
    found: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(xformopt.kernels.__path__):
        if module.ispkg:
            operator = importlib.import_module(f"xformopt.kernels.{module.name}.operator").OPERATOR
            _register(operator)
            found[operator.name] = operator
    return found


class _Dialect:
    """The registered operators by name: ``xf.linear`` is the overload that graphs hold."""

    def __getattr__(self, name: str) -> torch._ops.OpOverload:
        if name.startswith("_") or name not in load_operators():
            raise AttributeError(f"there is no operator xf.{name}")
        overload: torch._ops.OpOverload = getattr(torch.ops.xf, name).default
        return overload


xf = _Dialect()


def find_operator(target: object) -> Operator | None:
    """Return the xf operator behind a graph node's target, or None for any other target."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "xf":
        return load_operators()[target._opname]
    return None


def _register(operator: Operator) -> None:
    name = f"xf::{operator.name}"
    tags = (torch.Tag.dynamic_output_shape,) if operator.has_data_sizes else ()
    _LIBRARY.define(operator.name + operator.schema, tags=tags)
    for backend in ("CPU", "CUDA"):
        _LIBRARY.impl(operator.name, operator.reference, backend)
    torch.library.register_fake(name, operator.infer, lib=_LIBRARY)
    torch.library.register_autograd(name, _vjp_of(operator.reference), setup_context=_save_arguments, lib=_LIBRARY)


def _save_arguments(
    ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: dict[str, Any] | None = None
) -> None:
    ctx.positions = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    ctx.keywords = keyword_only_inputs or {}


def _vjp_of(reference: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """Return a backward that differentiates the reference, recomputing its forward."""

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arguments = list(ctx.others)
        for position, tensor in zip(ctx.positions, ctx.saved_tensors, strict=True):
            needs = ctx.needs_input_grad[position]
            arguments[position] = tensor.detach().requires_grad_(needs)
        with torch.enable_grad():
            outputs = reference(*arguments, **ctx.keywords)
        wanted = [p for p in ctx.positions if ctx.needs_input_grad[p]]
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(results, grads, strict=True) if o.requires_grad and g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [arguments[p] for p in wanted], [g for _, g in pairs], allow_unused=True
        )
        by_position = dict(zip(wanted, found, strict=True))
        return tuple(by_position.get(position) for position in range(len(arguments)))

    return backward
