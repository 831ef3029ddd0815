"""Decide what a MODEL string means: a zoo name, a directory, a `.pt2` file, a factory, or an artifact.

Paths win over names: `./minilm` is always a path, `minilm` is the zoo's unless a path here bears that name.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from xformopt.errors import CaptureError, UsageError

if TYPE_CHECKING:
    import torch

    from xformopt.capture.source import Source

__all__ = [
    "Archive",
    "ArtifactDirectory",
    "Factory",
    "HuggingFace",
    "ModelForm",
    "ZooModel",
    "classify",
    "resolve",
    "zoo_names",
]

# its weights come with an extra, not with the package
MINILM = "minilm"
_EXPECTED = (
    "a zoo name (`xformopt models` lists them), a Hugging Face directory, package.module:factory, a .pt2 file, or an "
    "artifact directory"
)
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class ZooModel:
    """A model that the package knows by name."""

    name: str


@dataclass(frozen=True)
class HuggingFace:
    """A Hugging Face or sentence-transformers directory."""

    path: Path


@dataclass(frozen=True)
class Factory:
    """``package.module:factory``, the user's own code."""

    spec: str


@dataclass(frozen=True)
class Archive:
    """A `.pt2` file."""

    path: Path


@dataclass(frozen=True)
class ArtifactDirectory:
    """A directory that xformopt wrote: it has an artifact.json."""

    path: Path


ModelForm: TypeAlias = ZooModel | HuggingFace | Factory | Archive | ArtifactDirectory


def classify(model: str | Path) -> ModelForm:
    """Tell which form a MODEL has, by looking at names and paths only; no weights are loaded.

    Args:
        model: What the user gave.

    Raises:
        UsageError: It is a name that nothing bears; the message has the nearest one.
        CaptureError: It is a path to something that is not a model.

    """
    text = str(model)
    path = Path(model).expanduser()
    if not text.strip():
        raise UsageError(f"The model is an empty name: expected {_EXPECTED}.")
    if path.exists():
        return _classify_path(path)
    if text == MINILM or (isinstance(model, str) and _is_in_zoo(text)):
        return ZooModel(text)
    if isinstance(model, str) and FACTORY.fullmatch(text):
        return Factory(text)
    if path.suffix == ".pt2" or isinstance(model, Path) or "/" in text or "\\" in text:
        raise CaptureError(f'There is no "{text}".{_near_path(path)} Expected {_EXPECTED}.')
    # a fold in braces is no part of the name
    plain = text.partition("{")[0].lower().replace("_", "-")
    here = [entry.name for entry in Path().iterdir()]
    near = difflib.get_close_matches(plain, [*zoo_names(), *here], n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(_quoted, near))}?" if near else ""
    raise UsageError(f'There is no model "{text}".{hint} Expected {_EXPECTED}.')


def zoo_names() -> tuple[str, ...]:
    """Return all zoo names: what the package holds, and MiniLM."""
    from xformopt.models.zoo import model_names

    return (MINILM, *model_names())


def resolve(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    length: int | None = None,
    attention: str | None = None,
) -> Source | torch.export.ExportedProgram | ArtifactDirectory:
    """Load what a MODEL names: a `Source` to export, an exported program, or an artifact's place.

    The options are those of `load_directory`; the other forms bring their own inputs.
    """
    from xformopt.capture.archive import load_pt2
    from xformopt.capture.factory import load_factory
    from xformopt.capture.huggingface import load_directory, minilm_directory

    form = classify(model)
    if isinstance(form, ArtifactDirectory):
        return form
    if isinstance(form, Archive):
        return load_pt2(form.path)
    if isinstance(form, Factory):
        return load_factory(form.spec)
    if isinstance(form, ZooModel) and form.name != MINILM:
        return _load_zoo_model(form.name)
    return load_directory(
        form.path if isinstance(form, HuggingFace) else minilm_directory(),
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        batch=batch,
        length=length,
        attention=attention,
    )


def _classify_path(path: Path) -> ModelForm:
    if path.is_dir():
        return ArtifactDirectory(path) if (path / "artifact.json").exists() else HuggingFace(path)
    if path.suffix == ".pt2":
        return Archive(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        raise CaptureError(
            f'"{path}" holds weights without the model they belong to. Give the Hugging Face directory '
            "around it, or a factory package.module:factory that builds the module and loads them."
        )
    if path.suffix == ".py":
        raise CaptureError(
            f'"{path}" is a Python file: name the function in it that returns the model, as "{path.stem}:function".'
        )
    if path.suffix == ".onnx":
        raise CaptureError(
            f'"{path}" is an ONNX file, which can be measured with "xformopt bench" but not optimized: give '
            "the PyTorch model it was exported from."
        )
    raise CaptureError(
        f'"{path}" is a file that is no model: expected a .pt2 archive, or a directory in Hugging Face format.'
    )


def _near_path(path: Path) -> str:
    """Suggest a neighbour of a path that does not exist."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f' Did you mean "{folder / near[0]}"?' if near else ""


def _is_in_zoo(name: str) -> bool:
    from xformopt.models.zoo import is_model

    return is_model(name)


def _load_zoo_model(name: str) -> Source:
    """Build a model of the package, with its trained weights where it has some."""
    from xformopt.capture.factory import bind_inputs
    from xformopt.capture.source import Source, check_finite
    from xformopt.models.zoo import find_model

    found = find_model(name)
    module = found.build()
    check_finite(module, f'"{name}"')
    given = module.example_inputs()  # type: ignore[operator]
    return Source(
        module=module,
        example_inputs=bind_inputs(module, given, name),
        dynamic=None,
        output_names=None,
        description=f"{name}: {found.summary}",
    )


def _quoted(name: str) -> str:
    return f'"{name}"'
