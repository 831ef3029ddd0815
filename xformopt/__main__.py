"""``python -m xformopt``."""

from __future__ import annotations

import sys

from xformopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
