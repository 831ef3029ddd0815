"""Manhattan attention: softmax attention on a grid whose weights decay with the distance along both axes."""

from xformopt.kernels.manhattan_attention.reference import manhattan_attention

__all__ = ["manhattan_attention"]
