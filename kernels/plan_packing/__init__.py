"""Where the tokens of a batch go that are not padding."""

from xformopt.kernels.plan_packing.reference import plan_packing

__all__ = ["plan_packing"]
