"""Which tokens to mix into which: a dense assignment to anchors."""

from xformopt.kernels.transform_tokens.reference import transform_tokens

__all__ = ["transform_tokens"]
