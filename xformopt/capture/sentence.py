"""The modules of a sentence-transformers directory: which encoder, which pooling, whether it normalizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformopt.capture.directory import read_json
from xformopt.errors import CaptureError

__all__ = ["SentenceModules", "read_sentence_modules"]

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens")
NAMES = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}


@dataclass(frozen=True)
class SentenceModules:
    """What modules.json says: the encoder's folder, the pooling (one of `MODES`), whether to normalize."""

    encoder: Path
    pooling: str
    normalize: bool


def read_sentence_modules(folder: Path) -> SentenceModules | None:
    """Read modules.json, or return None where there is none.

    Raises:
        CaptureError: The list is not encoder, pooling and at most a normalization, or the pooling is another.

    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CaptureError(f'"{path}" is not a list of modules: expected what sentence-transformers writes.')
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CaptureError(
            f'"{path}" lists the modules {", ".join(kinds) or "(none)"}; supported are Transformer, Pooling '
            "and Normalize, in this order. Write a factory for other modules and give "
            '"package.module:factory".'
        )
    encoder, pooling = (_subfolder(folder, module, path) for module in modules[:2])
    return SentenceModules(encoder, _pooling(pooling / "config.json"), normalize=len(kinds) == 3)


def _subfolder(folder: Path, module: dict[str, Any], origin: Path) -> Path:
    name = str(module.get("path", ""))
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise CaptureError(
            f'"{origin}" names the folder "{name}", outside the model\'s directory; refusing to read it.'
        )
    return target


def _pooling(path: Path) -> str:
    if not path.is_file():
        raise CaptureError(f'The pooling config "{path}" is missing, though modules.json names its folder.')
    config = read_json(path)
    config = config if isinstance(config, dict) else {}
    asked = config.get("pooling_mode") or [
        NAMES.get(flag.removeprefix("pooling_mode_"), flag.removeprefix("pooling_mode_"))
        for flag, value in config.items()
        if flag.startswith("pooling_mode_") and value is True
    ]
    modes = [asked] if isinstance(asked, str) else list(asked)
    if len(modes) == 1 and modes[0] in MODES:
        return str(modes[0])
    raise CaptureError(
        f'"{path}" asks for the pooling {" and ".join(map(str, modes)) or "(none)"}; supported is exactly '
        f"one of {', '.join(MODES)}."
    )
