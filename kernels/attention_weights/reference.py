"""The definition of attention's weights: that of ``xf.attention`` up to the product with the values.

Apart, the weights are a value of the graph that something else can stand before or behind: a quantizer, for one.
"""

from __future__ import annotations

from xformopt.kernels.attention.reference import attention_weights

__all__ = ["attention_weights"]
