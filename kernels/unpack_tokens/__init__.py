"""Give packed tokens their places back."""

from xformopt.kernels.unpack_tokens.reference import unpack_tokens

__all__ = ["unpack_tokens"]
