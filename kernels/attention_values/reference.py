"""The definition of values summed by weights, as in ``xf.attention``."""

from __future__ import annotations

from xformopt.kernels.attention.reference import attention_values

__all__ = ["attention_values"]
