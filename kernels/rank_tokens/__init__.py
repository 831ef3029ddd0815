"""Which tokens score highest."""

from xformopt.kernels.rank_tokens.reference import rank_tokens

__all__ = ["rank_tokens"]
