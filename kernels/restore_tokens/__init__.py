"""Give merged tokens back to those they were made of."""

from xformopt.kernels.restore_tokens.reference import restore_tokens

__all__ = ["restore_tokens"]
