"""Take some tokens of a sequence."""

from xformopt.kernels.select_tokens.reference import select_tokens

__all__ = ["select_tokens"]
