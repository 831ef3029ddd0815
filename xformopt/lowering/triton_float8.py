"""Linear layers of E4M3 by E4M3 in one operator, for GPUs whose tensor cores multiply it.

    xf.float_weight_linear(xf.fake_quantize_float(x))    ->    xf.float8_linear(x)

A program holds the rounding of activations and the layer apart, since elsewhere the rounding is simulated.
"""

from __future__ import annotations

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.kernels.float8_linear.reference import FORMAT
from xformopt.kernels.triton_form import load_kernels
from xformopt.program import Program, value_of

__all__ = ["multiply_in_float8"]

_CAST = torch.ops.aten._to_copy.default


def multiply_in_float8(program: Program, capability: tuple[int, int]) -> Program:
    """Return the program with such layers merged, or itself where there are none or the GPU is of no use to them.

    Args:
        program: Of any level.
        capability: The compute capability of the GPU.

    """
    kernel = load_kernels()["float8_linear"]
    if capability < kernel.capability:
        return program
    changed = program.copy()
    merged = [node for node in list(changed.nodes()) if _merge(changed, node)]
    return changed.drop_unused() if merged else program


def _merge(program: Program, node: fx.Node) -> bool:
    """Make one layer multiply in E4M3 where both of its factors are."""
    if node.target is not xf.float_weight_linear or node.kwargs["format"] != FORMAT:
        return False
    cast = source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is _CAST:
        # rounded numbers may have been cast on their way: what is rounded is then
        source = source.args[0]
        assert isinstance(source, fx.Node)
    if source.target is not xf.fake_quantize_float or source.kwargs["format"] != FORMAT:
        return False
    x = source.args[0]
    values = (value_of(argument) if isinstance(argument, fx.Node) else argument for argument in node.args)
    if load_kernels()["float8_linear"].accepts(*values) is not None:
        return False
    if cast is not source:
        assert isinstance(cast, fx.Node)
        with program.graph.inserting_before(node):
            x = program.graph.call_function(_CAST, (x,), cast.kwargs)
        x.meta = dict(cast.meta)
    node.target, node.args, node.kwargs = xf.float8_linear, (x, *node.args[1:]), {}
    return True
