"""Which task a user means: a name with options, or a class of the user's own, on the fold a model has not seen."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xformopt.errors import UsageError
from xformopt.models.tasks.index import find_task_class, is_task
from xformopt.models.tasks.task import Task
from xformopt.models.trained import Trained
from xformopt.models.zoo import find_model, is_model
from xformopt.pipeline.index import split_options

__all__ = ["find_task", "task_for"]

_FORM = (
    "A task is a frozen dataclass derived from xformopt.models.tasks.task.Task, with its class attributes and the "
    "methods calibration, test and judge."
)


def find_task(written: str, **options: Any) -> Task:
    """Return the task behind ``digits``, ``digits{fold=2}`` or ``package.module:Class``.

    Args:
        written: What the user wrote.
        options: Further fields, by name.

    Raises:
        UsageError: there is no such task or option, or a value does not suit it.
        CaptureError: the user's own module cannot be imported.

    """
    name, given = split_options(written, "task")
    kind = _own_task(name) if ":" in name else find_task_class(name)
    return _build(kind, {**given, **options})


def task_for(task: str | Task, label: str) -> Task:
    """Return the task for one model: for a model that was trained on it, on the fold that the model has not seen.

    Args:
        task: The task, or what the user wrote.
        label: What the model is called, such as ``digits-vit{fold=2}``.

    Raises:
        UsageError: there is no such task, or the fold asked for is one the model was trained on.

    """
    asks = isinstance(task, Task) or "fold" in split_options(task, "task")[1]
    chosen = task if isinstance(task, Task) else find_task(task)
    model = find_model(label) if is_model(label) else None
    if not isinstance(model, Trained) or model.task != chosen.name or model.fold == chosen.fold:
        return chosen
    if asks:
        raise UsageError(
            f"The model {label} was trained on what fold {chosen.fold} of the task {chosen.name} tests. "
            f"Judge it on {chosen.name}{{fold={model.fold}}}, or take {model.on_fold(chosen.fold).label}."
        )
    return replace(chosen, fold=model.fold)


def _own_task(spec: str) -> type[Task]:
    from xformopt.capture.factory import load_object

    kind = load_object(spec, _FORM)
    if not is_task(kind):
        raise UsageError(f'"{spec}" is no task. {_FORM}')
    wanted = ("metric", "higher_is_better", "inputs", "output")
    if missing := [name for name in wanted if not hasattr(kind, name)]:
        raise UsageError(f'The task "{spec}" lacks the class attribute {missing[0]!r}. {_FORM}')
    return typing.cast("type[Task]", kind)


def _build(kind: type[Task], options: Mapping[str, object]) -> Task:
    from pydantic import TypeAdapter, ValidationError

    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Its options: {', '.join(known)}."
            raise UsageError(f"The task {kind.name} has no option {option!r}. {hint}")
        try:
            values[option] = TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise UsageError(f"The task {kind.name} refuses {option}={value!r}: {reason}.") from None
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The task {kind.name} refuses its options: {error}.") from error
