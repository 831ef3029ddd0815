"""Which tokens have changed most since they were last looked at."""

from xformopt.kernels.changed_tokens.reference import changed_tokens

__all__ = ["changed_tokens"]
