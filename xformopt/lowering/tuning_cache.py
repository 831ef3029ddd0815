"""Where measured choices are kept: files in the cache folder, which may be damaged, from elsewhere, or not writable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from xformopt.errors import OutputError
from xformopt.files import cache_folder, write_atomically

__all__ = ["TileCache", "choices_file", "write_choices"]

TileT = TypeVar("TileT", bound=tuple[int, ...])


def choices_file(name: str) -> Path:
    """Return where the choices of that name are kept."""
    return cache_folder() / "tuning" / name


def write_choices(name: str, content: Mapping[str, Any]) -> None:
    """Write ``content`` to a file of the cache; one that cannot be written only costs time."""
    try:
        write_atomically(choices_file(name), json.dumps(content, indent=1))
    except (OSError, OutputError):
        return


@dataclass(frozen=True)
class TileCache(Generic[TileT]):
    """The tiles of all kernels of one kind, in one file.

    Attributes:
        name: Name of the file.
        tile: Makes a tile of its numbers.
        made_for: The machine and versions whose tiles these are; those of others are not taken.

    """

    name: str
    tile: Callable[..., TileT]
    made_for: Mapping[str, Any]

    def read(self) -> tuple[dict[str, TileT], str | None]:
        """Return the tiles by key and, where a file is there but is not taken, a sentence on why."""
        try:
            stored = json.loads(choices_file(self.name).read_text(encoding="utf-8"))
            header = stored["made_for"]
            tiles = {key: self.tile(*map(int, numbers)) for key, numbers in stored["tiles"].items()}
            differing = [name for name, value in self.made_for.items() if header.get(name) != value]
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}, f"{self.name} is ignored: it cannot be read"
        if differing:
            return {}, f"{self.name} is ignored: it was made for another {', '.join(differing)}"
        return tiles, None

    def write(self, tiles: Mapping[str, TileT]) -> None:
        """Replace the file."""
        content = {"made_for": self.made_for, "tiles": {key: list(tile) for key, tile in tiles.items()}}
        write_choices(self.name, content)
