"""How many tokens an operator that shortens a sequence takes away: a number, or a share of the tokens there are."""

from __future__ import annotations

from typing import Any

__all__ = ["removed_tokens"]


def removed_tokens(length: Any, prefix: int, r: int, percent: int) -> Any:
    """Return how many of ``length`` tokens go: ``r``, or where ``percent`` is given so many of a hundred, rounded down.

    The first ``prefix`` tokens always stay and do not count; ``length`` may be symbolic.
    """
    return (length - prefix) * percent // 100 if percent else r
