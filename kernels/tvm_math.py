"""Elementary functions for TVM kernels, of additions and multiplications only, so that loops over them vectorize.

The functions of the C library, which TVM calls otherwise, take one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["FUNCTIONS", "exp", "log2"]

# beyond these exp is 0 or infinite in fp32
_LOWEST, _HIGHEST = -87.0, 88.0
# Taylor's series for |r| <= ln 2 / 2: what is left out is below 0.3466^8 / 8! = 5e-9 of the value
_TERMS = 7
_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127
# the bits of sqrt 2 in fp32
_ROOT_OF_TWO = 0x3FB504F3
# ln 2 in two parts, the first with few bits, so that n * ln 2 is exact enough
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2.0) - _LN2_HIGH


def exp(x: Any) -> Any:
    """``e^x = 2^n e^r`` with ``n = floor(x / ln 2 + 1/2)`` and ``r = x - n ln 2``; relative error about 1e-7."""
    from tvm import tirx

    x = tirx.max(tirx.min(x, _constant(_HIGHEST)), _constant(_LOWEST))
    n = tirx.floor(x * _constant(1.0 / math.log(2.0)) + _constant(0.5))
    r = x - n * _constant(_LN2_HIGH) - n * _constant(_LN2_LOW)
    series = _constant(1.0 / math.factorial(_TERMS))
    for power in reversed(range(_TERMS)):
        series = series * r + _constant(1.0 / math.factorial(power))
    bits = (n.astype("int32") + tirx.const(_EXPONENT_BIAS, "int32")) * tirx.const(1 << _MANTISSA_BITS, "int32")
    return series * tirx.reinterpret("float32", bits)


def log2(x: Any) -> Any:
    """``log2 x = n + (2 / ln 2) (t + t^3 / 3 + ...)`` with ``x = 2^n m``, ``t = (m - 1) / (m + 1)``, for normal x > 0.

    m lies in [sqrt(1/2), sqrt 2), so that what is left out is below 0.1716^11 / 11 = 4e-10; absolute error about 1e-7.
    """
    from tvm import tirx

    bits = tirx.reinterpret("int32", x)
    # the mantissa of sqrt 2, whose bits carry into the exponent what is larger
    carry = tirx.const((1 << _MANTISSA_BITS) - (_ROOT_OF_TWO & (1 << _MANTISSA_BITS) - 1), "int32")
    exponent = (bits + carry >> _MANTISSA_BITS) - tirx.const(_EXPONENT_BIAS, "int32")
    m = tirx.reinterpret("float32", bits - (exponent << _MANTISSA_BITS))
    t = (m - _constant(1.0)) / (m + _constant(1.0))
    square = t * t
    series = _constant(1 / 9)
    for odd in (7, 5, 3, 1):
        series = series * square + _constant(1 / odd)
    return exponent.astype("float32") + _constant(2.0 / math.log(2.0)) * t * series


def _erf(x: Any) -> Any:
    """Abramowitz and Stegun 7.1.26: ``erf x = 1 - (a1 t + ... + a5 t^5) e^(-x^2)``, ``t = 1 / (1 + p x)``, for x >= 0.

    Its error is at most 1.5e-7; erf is odd.
    """
    from tvm import tirx

    size = tirx.abs(x)
    t = _constant(1.0) / (_constant(1.0) + _constant(0.3275911) * size)
    series = _constant(0.0)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + _constant(factor)) * t
    value = _constant(1.0) - series * exp(-size * size)
    return tirx.Select(x < _constant(0.0), -value, value)


def _tanh(x: Any) -> Any:
    return _constant(1.0) - _constant(2.0) / (exp(x * _constant(2.0)) + _constant(1.0))


def _sigmoid(x: Any) -> Any:
    return _constant(1.0) / (_constant(1.0) + exp(-x))


def _relu(x: Any) -> Any:
    from tvm import tirx

    return tirx.max(x, _constant(0.0))


def _gelu(x: Any) -> Any:
    return _constant(0.5) * x * (_constant(1.0) + _erf(x * _constant(math.sqrt(0.5))))


def _gelu_tanh(x: Any) -> Any:
    inner = _constant(math.sqrt(2.0 / math.pi)) * (x + _constant(0.044715) * x * x * x)
    return _constant(0.5) * x * (_constant(1.0) + _tanh(inner))


def _gelu_quick(x: Any) -> Any:
    return x * _sigmoid(_constant(1.702) * x)


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


# activations by the names of `xf.activation`
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": _gelu_quick,
    "silu": _silu,
}


def _constant(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")
