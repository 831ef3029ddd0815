"""Instantiate the class that a config names and fill it from the checkpoint, refusing what does not fit."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xformopt.errors import CaptureError

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded transformers model, and what the user should be told about how it was loaded."""

    model: Any
    notes: tuple[str, ...]


def load_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    pooler: bool = True,
) -> Checkpoint:
    """Load the model of a directory whose config and weight files have been checked.

    Args:
        folder: Holds config.json and the weights.
        config: config.json as parsed.
        trust_remote_code: Allow Python files of the directory to define the model.
        dtype: Of the parameters.
        attention: transformers' ``attn_implementation``; None for the model's own choice.
        pooler: False builds an encoder without its pooler, where the class can.

    Raises:
        CaptureError: The class is unknown, needs code that is not trusted, or does not fit the weights.

    """
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise CaptureError(
            f'The weights in "{folder}" are already quantized ({method}); expected floating-point weights. '
            "Give the original checkpoint and let xformopt quantize it."
        )
    with _offline():
        kind = _model_class(folder, config, trust_remote_code)
        options: dict[str, Any] = {"dtype": dtype, "config": _settings(folder, trust_remote_code)}
        if attention is not None:
            options["attn_implementation"] = attention
        if not pooler and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
            options["add_pooling_layer"] = False
        if trust_remote_code:
            options["trust_remote_code"] = True
        model, info = _fill(folder, kind, options)
    _check_keys(folder, model, info)
    custom = trust_remote_code and not type(model).__module__.startswith("transformers.")
    return Checkpoint(model, tuple(_notes(model, info, custom=custom)))


def _model_class(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    """Return the class to load with: the one in `architectures`, or AutoModel where there is none."""
    import transformers

    names = config.get("architectures") or ["AutoModel"]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else str(names)
    auto_map = config.get("auto_map") or {}
    custom = {auto: reference for auto, reference in auto_map.items() if auto.startswith("AutoModel")}
    if trust_remote_code and custom:
        matching = [auto for auto, reference in custom.items() if str(reference).endswith(f".{name}")]
        return getattr(transformers, (matching or [*custom])[0], transformers.AutoModel)
    kind = getattr(transformers, name, None)
    if inspect.isclass(kind) and (name == "AutoModel" or issubclass(kind, transformers.PreTrainedModel)):
        return kind
    if custom:
        raise CaptureError(
            f'The model in "{folder}" is defined by Python code in its own directory '
            f"({next(iter(custom.values()))}), and running code that comes with a model is off by default. "
            "Read that code; if you trust it, pass --trust-remote-code (trust_remote_code=True)."
        )
    near = difflib.get_close_matches(name, dir(transformers), n=1)
    hint = f' The nearest name it knows is "{near[0]}".' if near else ""
    raise CaptureError(
        f'"{folder / "config.json"}" names the architecture "{name}", which the installed transformers '
        f"{transformers.__version__} does not have.{hint} Install a version that has it, or correct the "
        "config."
    )


def _settings(folder: Path, trust_remote_code: bool) -> Any:
    """Return the transformers config with the cache switched off throughout."""
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise CaptureError(
            f'transformers {transformers.__version__} does not accept "{folder / "config.json"}": '
            f"{_sentence(error)} Correct the config, or install the version of transformers that wrote it."
        ) from error
    # another weight file named here would escape the checks made on the standard ones
    settings.transformers_weights = None
    for part in (settings, *(value for value in vars(settings).values() if hasattr(value, "use_cache"))):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return settings


def _fill(folder: Path, kind: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            output_loading_info=True,
            # so that every mismatch is reported by name; none is accepted
            ignore_mismatched_sizes=True,
            **options,
        )
    except ImportError as error:
        raise CaptureError(
            f'{kind.__name__} from "{folder}" needs a package that is not installed: {_sentence(error)}'
        ) from error
    except Exception as error:
        raise CaptureError(
            f'{kind.__name__} cannot be loaded from "{folder}": {type(error).__name__}: {_sentence(error)} '
            "The config does not describe a model that transformers can build, or does not fit its weights."
        ) from error
    return model, info


def _check_keys(folder: Path, model: Any, info: dict[str, Any]) -> None:
    """Refuse tensors that are missing or of another shape: transformers would draw them at random."""
    kind, unexpected = type(model).__name__, sorted(info["unexpected_keys"])
    if info["error_msgs"]:
        raise CaptureError(f'The weights in "{folder}" do not fit {kind}: {info["error_msgs"][0].splitlines()[0]}')
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CaptureError(
            f'The tensor "{name}" in "{folder}" has the shape {list(found)}, but {kind} with this '
            f"config.json needs {list(expected)}{_others(mismatched)}. The config and the weights are not of "
            "the same model."
        )
    if missing := sorted(info["missing_keys"]):
        renamed = f'; the weights hold "{unexpected[0]}", which it does not know' if unexpected else ""
        raise CaptureError(
            f'The weights in "{folder}" lack "{missing[0]}", which {kind} needs{_others(missing)}{renamed}. '
            "Missing tensors would be drawn at random: give a complete checkpoint, or set the class that the "
            'weights belong to in "architectures" of config.json.'
        )


def _notes(model: Any, info: dict[str, Any], *, custom: bool) -> Iterator[str]:
    if hasattr(model.config, "use_cache"):
        yield "use_cache=False: the model is captured without its key/value cache"
    if custom:
        yield "trust_remote_code is on: the model is defined by code from its own directory"
    unused = sorted(name for name in info["unexpected_keys"] if not name.startswith("pooler."))
    if unused:
        yield f'{len(unused)} tensors of the checkpoint are not used, the first is "{unused[0]}"'


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers off the network and off the terminal for as long as the block runs."""
    import huggingface_hub.constants
    import transformers

    constants, reports = huggingface_hub.constants, transformers.utils.logging
    before = (constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"), reports.get_verbosity())
    bars = reports.is_progress_bar_enabled()
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    reports.set_verbosity(logging.CRITICAL)
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        os.environ.pop("HF_HUB_OFFLINE", None)
        if before[1] is not None:
            os.environ["HF_HUB_OFFLINE"] = before[1]
        reports.set_verbosity(before[2])
        if bars:
            reports.enable_progress_bar()


def _others(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."
