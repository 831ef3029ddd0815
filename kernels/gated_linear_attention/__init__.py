"""Gated linear attention: each channel of a key has a decay of its own at each token."""

from xformopt.kernels.gated_linear_attention.reference import (
    gated_linear_attention,
    gated_linear_attention_masked,
    gated_linear_attention_step,
)

__all__ = ["gated_linear_attention", "gated_linear_attention_masked", "gated_linear_attention_step"]
