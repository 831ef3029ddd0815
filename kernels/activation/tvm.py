"""TVM kernel of ``xf.activation``, where no product before it takes it along: in vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import flat, starts, write_function
from xformopt.kernels.tvm_math import FUNCTIONS

__all__ = ["KERNEL", "activate"]

# what one task of a thread takes, and the vectors it is taken in
_PART, _LANES = 2048, 16


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["function"] not in FUNCTIONS:
        return f"the activation {arguments['function']} has no kernel"
    return None if arguments["x"].dtype == torch.float32 else "it is not in fp32"


def _emit(b: Builder, node: TvmNode) -> Any:
    function = node.arguments["function"]
    name = "_".join(["activation", function, *map(str, node.shape)])
    return b.call(name, lambda: activate(node.shape, function), [b.value(node.arguments["x"])], node.shape)


def activate(shape: tuple[int, ...], function: str) -> Any:
    """Return the function of x that applies the activation to every element."""
    from tvm.script.ir_builder import tirx as ir

    total = int(np.prod(shape))
    lanes = min(_LANES, total)
    size = min(_PART, total // lanes * lanes)

    def body(x: Any, y: Any) -> None:
        x, y = flat(x, (total,)), flat(y, (total,))
        with (
            ir.parallel(0, -(-total // size)) as part,
            ir.serial(0, size // lanes) as step,
            ir.vectorized(0, lanes) as j,
        ):
            place = starts(part, size, total) + step * lanes + j
            y[place] = FUNCTIONS[function](x[place])

    return write_function([("x", shape, "float32"), ("y", shape, "float32")], body)


KERNEL = Kernel(_emit, _accepts)
