"""The zoo: every architecture that a file of this package lists, by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from xformopt.errors import UsageError
from xformopt.models.architecture import Architecture

__all__ = ["architectures", "find_architecture"]

_PACKAGE = "xformopt.models"


@cache
def architectures() -> dict[str, Architecture]:
    """Return all architectures by name, in alphabetical order."""
    found: dict[str, Architecture] = {}
    package = importlib.import_module(_PACKAGE)
    for info in pkgutil.iter_modules(package.__path__):
        family = importlib.import_module(f"{_PACKAGE}.{info.name}")
        for architecture in getattr(family, "ARCHITECTURES", ()):
            if architecture.name in found:
                raise ValueError(f"two architectures of the zoo are called {architecture.name!r}")
            found[architecture.name] = architecture
    return dict(sorted(found.items()))


def find_architecture(name: str) -> Architecture:
    """Return one architecture.

    Raises:
        UsageError: there is none of this name; the message has the near ones.

    """
    known = architectures()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`xformopt models` lists them."
    raise UsageError(f"There is no model {name!r} in the zoo. {hint}")
