"""Lift activations and gated units: a pointwise formula of one value is identified by its values on a grid."""

from __future__ import annotations

import torch
from torch import fx

from xformopt.kernels.activation import FUNCTIONS
from xformopt.kernels.definition import xf
from xformopt.lift.probe import Probe, operator_name
from xformopt.program import value_of
from xformopt.program.precision import HALF_PRECISIONS
from xformopt.rewrite import Editor

__all__ = ["lift_activation", "lift_glu"]

_POINTWISE = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "pow", "square", "neg", "reciprocal", "abs", "sqrt", "rsqrt"),
        *("tanh", "erf", "erfc", "sigmoid", "exp", "log1p", "softplus", "_to_copy"),
        *("gelu", "silu", "relu", "relu6", "elu", "hardtanh", "clamp_min", "clamp"),
    )
)
# a formula ends in one of these; anything else cannot be the last step of an activation
_LAST = frozenset(("mul", "div", "gelu", "silu", "relu", "clamp_min", "clamp"))
_MAX_STEPS = 14
# where clamps act; a square or a cube of it is still a number
_FAR = torch.tensor([20.0, 60.0, 250.0, 1e3, 1e4])


def lift_activation(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Replace the longest pointwise formula ending in ``node`` that is a known activation."""
    if operator_name(node) not in _LAST or node.target is xf.activation:
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor) or not value_of(node).is_floating_point():
        return None
    found = None
    for source in _single_sources(editor, node):
        found = _identify(editor, node, source) or found
        if found:
            break
    if found is None:
        return None
    source, function = found
    return editor.call(xf.activation, source, function=function)


def _single_sources(editor: Editor, node: fx.Node) -> list[fx.Node]:
    """Return the values of which ``node`` is a pointwise function, nearest first."""
    order = {n: i for i, n in enumerate(editor.program.graph.nodes)} if len(node.all_input_nodes) > 1 else {}
    frontier = set(_tensors(editor, node))
    sources: list[fx.Node] = []
    for _ in range(_MAX_STEPS):
        if len(frontier) == 1:
            sources.append(next(iter(frontier)))
        if not frontier:
            break
        if len(frontier) > 1 and not order:
            order = {n: i for i, n in enumerate(editor.program.graph.nodes)}
        latest = max(frontier, key=lambda n: order.get(n, 0))
        if operator_name(latest) not in _POINTWISE:
            break
        frontier.remove(latest)
        frontier |= set(_tensors(editor, latest))
    return sources


def _tensors(editor: Editor, node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if not _is_scalar(editor, a)]


def _is_scalar(editor: Editor, node: fx.Node) -> bool:
    value = editor.constant(node)
    return value is not None and value.numel() == 1


def _identify(editor: Editor, node: fx.Node, source: fx.Node) -> tuple[fx.Node, str] | None:
    if tuple(value_of(source).shape) != tuple(value_of(node).shape) or value_of(source).dtype != value_of(node).dtype:
        return None
    # beyond |x| = 12 every activation is its asymptote; the middle tells exact and approximate GELU apart
    grid = torch.cat([torch.linspace(-12, 12, 4001), torch.linspace(-0.1, 0.1, 501), _FAR, -_FAR])
    # in 16 bits each step would round: the steps are those of any type, unless the model casts between them
    half = value_of(source).dtype in HALF_PRECISIONS
    grid = grid if half else grid.to(value_of(source).dtype)
    known = Probe(editor.program).run(node, {source: grid}, _is_pointwise)
    if not isinstance(known, torch.Tensor) or known.shape != grid.shape:
        return None
    for name, function in FUNCTIONS.items():
        # relu rounds nothing, and a clamp at 1e-9 (a guard against division by zero) is not one
        close = 0.0 if name == "relu" else max(2e-6, torch.finfo(known.dtype).eps)
        if torch.allclose(known.double(), function(grid.double()), rtol=close, atol=close):
            return source, name
    return None


def _is_pointwise(node: fx.Node) -> bool:
    return operator_name(node) in _POINTWISE


def lift_glu(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``activation(gate) * up`` with both of one shape becomes ``xf.glu``."""
    if operator_name(node) != "mul" or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for activated, up in (node.args, node.args[::-1]):
        assert isinstance(activated, fx.Node)
        assert isinstance(up, fx.Node)
        if activated.target is not xf.activation or len(activated.users) > 1:
            continue
        gate = activated.args[0]
        assert isinstance(gate, fx.Node)
        if gate is not up and tuple(value_of(gate).shape) == tuple(value_of(up).shape):
            return editor.call(xf.glu, gate, up, function=activated.kwargs["function"])
    return None
