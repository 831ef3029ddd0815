"""Some tokens of a sequence replaced."""

from xformopt.kernels.update_tokens.reference import update_tokens

__all__ = ["update_tokens"]
