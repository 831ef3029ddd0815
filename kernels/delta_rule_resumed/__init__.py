"""The delta rule from a state that earlier tokens left, and the state for later ones."""

from xformopt.kernels.delta_rule_resumed.reference import delta_rule_resumed

__all__ = ["delta_rule_resumed"]
