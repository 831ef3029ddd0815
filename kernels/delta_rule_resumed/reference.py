"""The definition of the delta rule over tokens that go on after others, which is that of the rule itself."""

from __future__ import annotations

import torch

from xformopt.kernels import delta_rule as rule

__all__ = ["delta_rule_resumed"]


def delta_rule_resumed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta rule from the ``state`` that earlier tokens left, ``[B, heads, D, E]``.

    A sequence in parts, each from the state of the one before, is the sequence as a whole.  Operands are those of
    ``delta_rule``; returns its result, ``[B, T, heads * E]``, and the state after the last token.
    """
    return rule.delta_rule_resumed(q, k, v, beta, state, heads=heads, scale=scale)
