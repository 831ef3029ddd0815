"""Which tokens to merge: bipartite soft matching."""

from xformopt.kernels.match_tokens.reference import match_tokens

__all__ = ["match_tokens"]
