"""TVM kernel of ``xf.add_layer_norm``: that of ``xf.layer_norm``, which takes a residual."""

from __future__ import annotations

from xformopt.kernels.layer_norm.tvm import accepts, emit
from xformopt.kernels.tvm_form import Kernel

__all__ = ["KERNEL"]

KERNEL = Kernel(emit, accepts)
