"""TVM kernel of ``xf.linear_activation``: the product of ``xf.linear``, the activation in its epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xformopt.kernels.linear.tvm import accepts as accepts_product
from xformopt.kernels.linear.tvm import emit
from xformopt.kernels.tvm_form import Kernel, Verdict
from xformopt.kernels.tvm_math import FUNCTIONS

__all__ = ["KERNEL"]


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    known = arguments["function"] in FUNCTIONS
    return accepts_product(arguments) if known else f"the activation {arguments['function']} has no kernel"


KERNEL = Kernel(emit, _accepts)
