"""Lets the GPU programs run from a copy of the repository that is not installed; imported before ``xformopt``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# tiles that were chosen are kept from call to call; the package that names the folder otherwise may be missing
os.environ.setdefault("XFORMOPT_CACHE", str(Path.home() / ".cache" / "xformopt"))

if importlib.util.find_spec("xformopt") is None:
    sys.path.append(str(ROOT))
if importlib.util.find_spec("xformopt.kernels") is None:
    import xformopt

    # these packages lie beside it until it is installed
    xformopt.__path__.append(str(ROOT))
