"""The zoo: every architecture that a file of this package lists, and every trained model of a task, by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from xformopt.errors import UsageError
from xformopt.models.architecture import Architecture
from xformopt.models.trained import Trained

__all__ = ["architectures", "find_architecture", "find_model", "find_trained", "is_model", "model_names", "trained"]

_PACKAGE = "xformopt.models"
_WRITTEN = re.compile(r"(?P<name>[A-Za-z][\w.-]*)(?:\{fold=(?P<fold>\d+)\})?")


@cache
def architectures() -> dict[str, Architecture]:
    """Return all architectures by name, in alphabetical order."""
    found: dict[str, Architecture] = {}
    for family in _modules(_PACKAGE):
        for architecture in getattr(family, "ARCHITECTURES", ()):
            if architecture.name in found:
                raise ValueError(f"two architectures of the zoo are called {architecture.name!r}")
            found[architecture.name] = architecture
    return dict(sorted(found.items()))


@cache
def trained() -> dict[str, Trained]:
    """Return all trained models by name, in alphabetical order."""
    found: dict[str, Trained] = {}
    for task in _modules(f"{_PACKAGE}.tasks"):
        for model in getattr(task, "TRAINED", ()):
            if model.name in found or model.name in architectures():
                raise ValueError(f"two models of the zoo are called {model.name!r}")
            found[model.name] = model
    return dict(sorted(found.items()))


def model_names() -> tuple[str, ...]:
    """Return the names of all models that the package itself holds."""
    return tuple(sorted((*architectures(), *trained())))


def is_model(name: str) -> bool:
    """Whether a model of the zoo bears this name, a fold in braces aside."""
    written = _WRITTEN.fullmatch(name)
    return written is not None and written["name"] in model_names()


def find_model(name: str) -> Architecture | Trained:
    """Return the model behind ``deit-small``, ``digits-vit`` or ``digits-vit{fold=2}``.

    Raises:
        UsageError: there is none of this name, or it has no such fold; the message has the near ones.

    """
    written = _WRITTEN.fullmatch(name)
    plain = written["name"] if written else name
    if written and plain in architectures() and written["fold"] is None:
        return architectures()[plain]
    if written and plain in trained():
        return trained()[plain].on_fold(int(written["fold"] or 0))
    if plain in architectures():
        raise UsageError(f"The model {plain} has random weights and no folds: write {plain}.")
    raise UsageError(f"There is no model {name!r} in the zoo. {_near(plain, model_names())}")


def find_architecture(name: str) -> Architecture:
    """Return one architecture.

    Raises:
        UsageError: there is none of this name; the message has the near ones.

    """
    if name not in architectures():
        raise UsageError(f"There is no architecture {name!r} in the zoo. {_near(name, tuple(architectures()))}")
    return architectures()[name]


def find_trained(name: str) -> Trained:
    """Return one trained model, without its checkpoint being read.

    Raises:
        UsageError: there is none of this name; the message has the near ones.

    """
    if name not in trained():
        raise UsageError(f"There is no trained model {name!r}. {_near(name, tuple(trained()))}")
    return trained()[name]


def _modules(package: str) -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not info.ispkg:
            yield importlib.import_module(f"{package}.{info.name}")


def _near(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else "`xformopt models` lists them."
