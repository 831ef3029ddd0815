"""Start-up stays cheap: torch is imported when a model is, not for a help text."""

from __future__ import annotations

import os
import subprocess
import sys

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers", "matplotlib", "sympy", "networkx", "scipy")
LIST_LOADED = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"


def loaded_by(code: str) -> str:
    """Return which heavy packages a fresh interpreter holds after running ``code``."""
    script = f"{code}\n{LIST_LOADED}"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("import xformopt") == ""


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from xformopt.cli import main
sys.argv = ["xformopt", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(code) == ""
