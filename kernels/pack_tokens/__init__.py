"""Take the tokens of a batch that are not padding, one after another."""

from xformopt.kernels.pack_tokens.reference import pack_tokens

__all__ = ["pack_tokens"]
