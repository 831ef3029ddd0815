"""Find passes by name, and read them with their options as the command line and recipes write them.

Nothing is registered: the file names are the index, and only the pass that is asked for is imported.  The passes stand
above the pipeline, so that this file knows their package by its name alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xformopt.errors import PassError, UsageError

if TYPE_CHECKING:
    from xformopt.pipeline import Effect, Pass

__all__ = [
    "Option",
    "PassInfo",
    "build_pass",
    "find_pass",
    "format_pass",
    "list_passes",
    "parse_pass",
    "pass_files",
    "split_options",
]

_PACKAGE = "xformopt.passes"
_ENTRY_POINTS = _PACKAGE
_WRITTEN = re.compile(r"(?P<name>[\w.:-]+)\s*(?:\{(?P<options>.*)\})?", re.DOTALL)
_ATTRIBUTE = re.compile(r"^ {4}(?P<name>\w+): (?P<doc>.+(?:\n {8}.+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Option:
    """One option of a pass."""

    name: str
    type: str
    default: object
    doc: str


@dataclass(frozen=True)
class PassInfo:
    """What a listing says of a pass."""

    name: str
    family: str
    effect: Effect
    sources: tuple[str, ...]
    options: tuple[Option, ...]
    summary: str


def pass_files() -> dict[str, list[str]]:
    """Return the modules behind each built-in pass name; one each, unless two families clash."""
    found: dict[str, list[str]] = {}
    roots = importlib.import_module(_PACKAGE).__path__
    for family in pkgutil.iter_modules(roots):
        if not family.ispkg:
            continue
        package = f"{_PACKAGE}.{family.name}"
        folders = [f"{path}/{family.name}" for path in roots]
        for module in pkgutil.iter_modules(folders):
            # a folder inside a family holds what its passes share
            if not module.ispkg:
                found.setdefault(module.name.replace("_", "-"), []).append(f"{package}.{module.name}")
    return found


def find_pass(name: str) -> type[Pass]:
    """Return the pass class behind ``fuse-qkv``, ``fuse_qkv``, ``package.module:Class`` or an entry point's name.

    Raises:
        UsageError: there is no such pass; the message names the nearest ones.
        PassError: the pass exists but cannot be imported.

    """
    if ":" in name:
        return _load(name, *name.split(":", 1))
    wanted = name.replace("_", "-")
    files = pass_files()
    if wanted in files:
        return _load(name, files[wanted][0], "".join(word.capitalize() for word in wanted.split("-")))
    foreign = {entry.name.replace("_", "-"): entry for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS)}
    if wanted in foreign:
        return _load(name, *foreign[wanted].value.split(":", 1))
    near = difflib.get_close_matches(wanted, [*files, *foreign], n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "See `xformopt passes` for those that exist."
    raise UsageError(f"There is no pass named {name!r}. {hint}")


def _load(name: str, module: str, attribute: str) -> type[Pass]:
    from xformopt.pipeline import Pass

    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        # only the module itself may be missing; what it imports is its own affair
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(f"There is no pass {name!r}: the module {error.name} cannot be found.") from error
        raise PassError(f"The pass {name!r} could not be imported: {error}.") from error
    except ImportError as error:
        raise PassError(f"The pass {name!r} could not be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"There is no pass {name!r}: {module} defines no pass class {attribute}.")
    return found


def list_passes() -> list[PassInfo]:
    """Describe every built-in pass and every pass of an entry point, by family and name."""
    foreign = {entry.name for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS)}
    found = [describe(find_pass(name)) for name in {*pass_files(), *foreign}]
    return sorted(found, key=lambda info: (info.family, info.name))


def describe(kind: type[Pass]) -> PassInfo:
    """Return what a listing says of one pass class; ``family`` is empty for passes from elsewhere."""
    from xformopt.pipeline import pass_name

    parts = kind.__module__.split(".")
    family = parts[2] if parts[:2] == ["xformopt", "passes"] else ""
    docs = {found["name"]: " ".join(found["doc"].split()) for found in _ATTRIBUTE.finditer(inspect.getdoc(kind) or "")}
    options = tuple(
        Option(field.name, _type_name(kind, field), _default(field), docs.get(field.name, ""))
        for field in dataclasses.fields(kind)
    )
    summary = (inspect.getdoc(kind) or "").split("\n", 1)[0]
    return PassInfo(pass_name(kind), family, kind.effect, tuple(kind.sources), options, summary)


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _type_name(kind: type[Pass], field: dataclasses.Field[Any]) -> str:
    hint = typing.get_type_hints(kind)[field.name]
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def parse_pass(text: str) -> Pass:
    """Read ``merge-tokens{r=8,metric=keys}``.

    Raises:
        UsageError: the text, the name, an option or a value is wrong.

    """
    return build_pass(*split_options(text, "pass"))


def split_options(text: str, what: str) -> tuple[str, dict[str, object]]:
    """Split ``name{option=value,...}`` into the name and its options, values as text, lists of text or None.

    Args:
        text: As the user wrote it.
        what: What is named, for the message.

    Raises:
        UsageError: the text has another form.

    """
    if not (found := _WRITTEN.fullmatch(text.strip())):
        raise UsageError(f"{text!r} is not a {what}: write NAME or NAME{{option=value,...}}.")
    options: dict[str, object] = {}
    for part in _split(found["options"] or ""):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{part!r} in {text!r} is not an option: write option=value.")
        options[name.strip()] = _read(value.strip())
    return found["name"], options


def build_pass(name: str, options: Mapping[str, object]) -> Pass:
    """Make the pass ``name`` with the given options, each converted to its field's type.

    Raises:
        UsageError: there is no such pass or option, or a value does not fit its type.

    """
    kind = find_pass(name)
    info = describe(kind)
    hints = typing.get_type_hints(kind)
    known = {option.name for option in info.options}
    values: dict[str, Any] = {}
    for given, value in options.items():
        option = given.replace("-", "_")
        if option not in known:
            raise UsageError(f"The pass {info.name} has no option {given!r}. {_explain(info)}")
        values[option] = _converted(info, given, value, hints[option])
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The pass {info.name} refuses its options: {error}. {_explain(info)}") from error


def _converted(info: PassInfo, given: str, value: object, kind: Any) -> Any:
    # where no pass has options, as in the recipe `exact`, it is not needed
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise UsageError(f"The pass {info.name} refuses {given}={value!r}: {reason}. {_explain(info)}") from None


def format_pass(pass_: Pass) -> str:
    """Write a pass as :func:`parse_pass` reads it; options at their default are left out."""
    changed = [
        f"{field.name}={_write(getattr(pass_, field.name))}"
        for field in dataclasses.fields(pass_)
        if getattr(pass_, field.name) != _default(field)
    ]
    return pass_.name + (f"{{{','.join(changed)}}}" if changed else "")


def _explain(info: PassInfo) -> str:
    if not info.options:
        return "It has no options."
    return "Its options: " + "; ".join(f"{o.name} ({o.type}, default {_write(o.default)})" for o in info.options) + "."


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts = re.split(r",(?![^\[]*\])", text)
    return [part.strip() for part in parts if part.strip()]


def _read(text: str) -> object:
    if text.startswith("[") and text.endswith("]"):
        return [_read(part) for part in _split(text[1:-1])]
    return {"none": None}.get(text.lower(), text)


def _write(value: object) -> str:
    if isinstance(value, list | tuple | frozenset | set):
        return "[" + ",".join(map(_write, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
