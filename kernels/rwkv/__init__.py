"""The time mixing of RWKV-4: a running mean of values, weighted by keys and by age."""

from xformopt.kernels.rwkv.reference import rwkv, rwkv_masked, rwkv_start, rwkv_step

__all__ = ["rwkv", "rwkv_masked", "rwkv_start", "rwkv_step"]
