"""Find the tasks: every file of this package that defines one is listed, and nothing is registered."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from functools import cache

from xformopt.errors import UsageError
from xformopt.models.tasks.task import Task

__all__ = ["find_task_class", "is_task", "tasks"]

_PACKAGE = "xformopt.models.tasks"


@cache
def tasks() -> dict[str, type[Task]]:
    """Return all tasks of the package by name, in alphabetical order."""
    found: dict[str, type[Task]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        module = importlib.import_module(f"{_PACKAGE}.{info.name}")
        for kind in vars(module).values():
            if is_task(kind) and kind.__module__ == module.__name__:
                found[kind.name] = kind
    return dict(sorted(found.items()))


def find_task_class(name: str) -> type[Task]:
    """Return one task of the package.

    Raises:
        UsageError: there is none of this name; the message has the near ones.

    """
    if name in tasks():
        return tasks()[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), tasks(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"The tasks are: {', '.join(tasks())}."
    raise UsageError(f"There is no task {name!r}. {hint} A task of your own is named package.module:Class.")


def is_task(kind: object) -> bool:
    """Whether this is a task that can be made: a subclass with a name and all its methods."""
    if not (isinstance(kind, type) and issubclass(kind, Task)) or inspect.isabstract(kind):
        return False
    # a base class for tasks may have every method but no name
    return hasattr(kind, "name")
