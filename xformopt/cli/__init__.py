"""The command line: words around the functions of ``xformopt.api``, and no logic.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 done, 1 the work failed, 2 wrong usage."""
    from xformopt.cli.boundary import run

    return run(list(sys.argv[1:] if arguments is None else arguments))
