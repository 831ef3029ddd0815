"""Say everything in one way, and leave out what says nothing.

    view(clone(transpose(x, -1, -2)), [4, 6]) + 0    ->    reshape(permute(x, [1, 0]), [4, 6])

**Exact**: values are moved and renamed, never computed anew.  Works at every level; other passes expect its spellings
(listed in ``xformopt.canonical``), so it runs before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from xformopt.canonical import CANONICAL_RULES
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program
from xformopt.rewrite import Rule

__all__ = ["Canonicalize"]


@dataclass(frozen=True)
class Canonicalize(RewritePass):
    """Remove what does nothing and give every view, cast and scalar its one spelling."""

    takes: ClassVar[Level] = Level.CAPTURED
    leaves: ClassVar[Level] = Level.CAPTURED

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the rules that lifting uses, too."""
        return CANONICAL_RULES
