"""Cross-covariance attention: channels attend to channels, at a cost linear in the tokens."""

from xformopt.kernels.xca.reference import xca

__all__ = ["xca"]
