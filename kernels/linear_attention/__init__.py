"""Linear attention: softmax replaced by a product of feature maps, causal or not."""

from xformopt.kernels.linear_attention.reference import (
    linear_attention,
    linear_attention_masked,
    linear_attention_step,
)

__all__ = ["linear_attention", "linear_attention_masked", "linear_attention_step"]
