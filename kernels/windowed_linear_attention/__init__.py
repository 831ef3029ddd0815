"""Linear attention with a window of softmax attention: both kinds of weights under one sum."""

from xformopt.kernels.windowed_linear_attention.reference import (
    Window,
    windowed_linear_attention,
    windowed_linear_attention_masked,
    windowed_linear_attention_step,
)

__all__ = [
    "Window",
    "windowed_linear_attention",
    "windowed_linear_attention_masked",
    "windowed_linear_attention_step",
]
