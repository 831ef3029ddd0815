"""Recipes: named lists of passes with their options, as TOML files.

    description = "what the recipe is for"

    [[pass]]
    name = "fuse-qkv"
    min_layers = 2

Every key beside ``name`` is an option of the pass.  Those shipped with the package lie in ``xformopt/recipes``.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from xformopt.errors import UsageError
from xformopt.files import write_atomically
from xformopt.pipeline.base import Pass
from xformopt.pipeline.index import build_pass

__all__ = ["list_recipes", "load_recipe", "save_recipe"]

_FORM = 'Expected a description and one [[pass]] table per pass, each with a name: [[pass]] name = "fuse-qkv".'


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("xformopt").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str | Path) -> tuple[Pass, ...]:
    """Return the passes of a recipe.

    Args:
        name: Of a recipe that comes with the package, or the path of a TOML file.

    Raises:
        UsageError: there is no such recipe, the file is not one, or a pass or an option in it does not exist.

    """
    text, where = _read(name)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The recipe {where} is not valid TOML: {error}. {_FORM}") from error
    return tuple(_build(entry, where) for entry in _entries(values, where))


def save_recipe(passes: Iterable[Pass], path: str | Path, *, description: str = "") -> None:
    """Write passes, with the options that differ from their defaults, as a recipe file.

    Raises:
        OutputError: the file cannot be written.
        UsageError: an option has a value that TOML cannot hold.

    """
    blocks = [f"description = {_write(description or 'saved by xformopt')}"]
    for pass_ in passes:
        lines = ["[[pass]]", f"name = {_write(_name_to_find(pass_))}"]
        lines += [f"{key} = {_write(value)}" for key, value in _changed_options(pass_).items()]
        blocks.append("\n".join(lines))
    write_atomically(path, "\n\n".join(blocks) + "\n")


def _read(name: str | Path) -> tuple[str, str]:
    """Return the text of a recipe, and what to call it."""
    shipped = list_recipes()
    if str(name) in shipped:
        return resources.files("xformopt").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8"), f'"{name}"'
    path = Path(name).expanduser()
    if path.suffix != ".toml" and not path.exists():
        near = difflib.get_close_matches(str(name), shipped, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise UsageError(
            f'There is no recipe "{name}".{hint} Available: {", ".join(shipped)}; or give the path of a TOML file.'
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8 text"
        raise UsageError(
            f"The recipe {path} cannot be read: {reason}. Name a TOML file, or one of {', '.join(shipped)}."
        ) from error


def _entries(values: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    if unknown := [key for key in values if key not in ("description", "pass")]:
        raise UsageError(f'The recipe {where} has the unknown key "{unknown[0]}". {_FORM}')
    if not isinstance(values.get("description", ""), str):
        raise UsageError(f"The description of the recipe {where} is not a string. {_FORM}")
    entries = values.get("pass")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"The recipe {where} names no passes. {_FORM}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UsageError(f"Pass {number} of the recipe {where} has no name. {_FORM}")
    return entries


def _build(entry: Mapping[str, Any], where: str) -> Pass:
    try:
        return build_pass(entry["name"], {key: value for key, value in entry.items() if key != "name"})
    except UsageError as error:
        raise UsageError(f"In the recipe {where}: {error}") from error


def _name_to_find(pass_: Pass) -> str:
    kind = type(pass_)
    return pass_.name if kind.__module__.startswith("xformopt.passes.") else f"{kind.__module__}:{kind.__name__}"


def _changed_options(pass_: Pass) -> dict[str, Any]:
    changed = {}
    for option in dataclasses.fields(pass_):
        value = getattr(pass_, option.name)
        default = option.default_factory() if callable(option.default_factory) else option.default
        if value != default:
            changed[option.name] = value
    return changed


def _write(value: object) -> str:
    """Return a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_write, value))}]"
    if isinstance(value, set | frozenset):
        return f"[{', '.join(sorted(map(_write, value)))}]"
    raise UsageError(f"A recipe cannot hold the option value {value!r}: TOML has no {type(value).__name__}.")
