"""A linear layer whose weights are signed powers of two."""

from xformopt.kernels.shift_linear.reference import power_table, shift_linear

__all__ = ["power_table", "shift_linear"]
