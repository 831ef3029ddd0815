"""The delta rule: a state that replaces what it held for a key instead of adding to it."""

from xformopt.kernels.delta_rule.reference import delta_rule, delta_rule_masked, delta_rule_resumed, delta_rule_step

__all__ = ["delta_rule", "delta_rule_masked", "delta_rule_resumed", "delta_rule_step"]
