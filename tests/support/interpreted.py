"""Runs Triton kernels on the processor: results are written over NaN, and compared with the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from xformopt.kernels.definition import load_operators
from xformopt.kernels.triton_form import load_kernels

__all__ = ["TOLERANCE", "assert_kernel", "computed", "randn", "relative"]

_patch_tensor = interpreter._patch_lang_tensor
_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter.InterpreterBuilder.create_fp_to_fp


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """Bounds of loops are arrays of one element, which Triton 3.6 makes integers and NumPy 2.4 refuses to."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter holds bfloat16 as its bits, and Triton 3.6 multiplies those: widen them first, which is exact."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


def _convert_with_torch(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
    """The interpreter of Triton 3.6 cuts off where a GPU rounds to floats of 8 bits: to nearest, halves to even."""
    if dst_type.scalar != tl.float8e4nv:
        return _convert(self, src, dst_type, rounding)
    numbers = torch.from_numpy(np.ascontiguousarray(src.data))
    # what lies beyond the largest becomes the largest
    codes = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return interpreter.TensorHandle(codes.numpy(), dst_type.scalar)


interpreter.InterpreterBuilder.create_fp_to_fp = _convert_with_torch
interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter.InterpreterBuilder.create_dot = _dot_of_numbers

# relative L2 against float64
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Numbers that depend on the shape alone."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance; the absolute one where nothing but zeros is wanted."""
    size = wanted.double().norm()
    return float((ours.double() - wanted.double()).norm() / (size if size > 0 else 1.0))


def computed(name: str, *operands: Any, **options: Any) -> Any:
    """What the kernel of an operator computes, into tensors that were NaN."""
    assert triton.knobs.runtime.interpret
    kernel = load_kernels()[name]
    assert kernel.accepts(*operands, **options) is None
    plan = kernel.plan(*operands, **options)
    plan.spoil()
    # what is infinite is so on a GPU too, without a warning
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return plan.run()


def assert_kernel(name: str, *operands: Any, tolerance: float | None = None, **options: Any) -> Any:
    """Compare with the definition in float64; returns what the kernel computed."""
    ours = computed(name, *operands, **options)
    exact = [_in_double(x) for x in operands]
    keywords = {n: _in_double(x) for n, x in options.items()}
    wanted = load_operators()[name].reference(*exact, **keywords)
    pairs = zip(ours, wanted, strict=True) if isinstance(wanted, tuple) else [(ours, wanted)]
    for found, expected in pairs:
        assert found.shape == expected.shape
        assert found.isfinite().all()
        assert relative(found, expected) <= (tolerance or TOLERANCE[found.dtype])
    return ours


def _in_double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
