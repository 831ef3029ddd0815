"""Run mypy on the package as it is installed: a folder of links shows it the nested layout (import hooks it cannot).

python tools/typecheck.py [mypy options]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FARM = ROOT / "build" / "typecheck"


def main() -> int:
    package = FARM / "xformopt"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        link.unlink()
    sources = [*(ROOT / "xformopt").iterdir(), *(ROOT / room for room in ("passes", "kernels", "models"))]
    for source in sources:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(os.path.relpath(source, package), source.is_dir())
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, "-p", "xformopt", *sys.argv[1:]]
    return subprocess.run(command, cwd=FARM).returncode


if __name__ == "__main__":
    sys.exit(main())
