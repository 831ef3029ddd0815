"""The model as the user names it, captured: the Program everything is compared with, and what belongs beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from xformopt.errors import UsageError
from xformopt.program import Program, example_sizes, numpy_interface, sample_inputs

if TYPE_CHECKING:
    import torch

__all__ = ["Model", "Original", "capture_original", "chosen_inputs", "chosen_sizes"]


@dataclass(frozen=True, eq=False)
class Original:
    """A captured model.

    Attributes:
        program: As captured.
        label: What to call it in reports.
        files: Tokenizer and processor files that belong beside an artifact.
        notes: What the user should be told about how it was loaded.

    """

    program: Program
    label: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


Model: TypeAlias = "str | Path | Program | torch.nn.Module | Original"


def capture_original(
    model: Model,
    *,
    trust_remote_code: bool = False,
    length: int | None = None,
) -> Original:
    """Capture a model in any form.

    Args:
        model: A MODEL string or path, a torch module with ``example_inputs()``, or a Program.
        trust_remote_code: Allow Python files of a Hugging Face directory to define the model.
        length: Tokens of the example inputs of a Hugging Face directory.

    Raises:
        CaptureError: the model cannot be captured.
        UsageError: no model bears that name.

    """
    from xformopt.capture import capture, capture_source
    from xformopt.capture.resolve import ArtifactDirectory, classify

    if isinstance(model, Original):
        return model
    if isinstance(model, Program):
        return Original(model, model.name)
    if not isinstance(model, str | Path):
        return Original(numpy_interface(capture(model)), type(model).__name__)
    form = classify(model)
    if isinstance(form, ArtifactDirectory):
        return _of_artifact(form.path)
    program, source = capture_source(model, trust_remote_code=trust_remote_code, length=length)
    label = str(model) if isinstance(model, str) and not Path(model).exists() else Path(model).resolve().name
    # what runs beside it takes arrays
    program = numpy_interface(program)
    return Original(program, label, source.files if source else (), source.notes if source else ())


def _of_artifact(folder: Path) -> Original:
    from xformopt.lowering.artifact import Artifact
    from xformopt.lowering.manifest import check_files, read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    program = Artifact(manifest, folder).original()
    own = {manifest.model, f"{manifest.model}.data", "program.txt"}
    kept = [name for name in manifest.files if _is_companion(name) and name not in own]
    return Original(program, manifest.source or manifest.name, tuple(folder / name for name in kept))


def _is_companion(name: str) -> bool:
    """Whether a file of an artifact came from its source (what xformopt writes itself is made anew)."""
    made = ("reference_inputs.safetensors", "reference_outputs.safetensors", "bench.json", "report.html")
    return "/" not in name and name not in made


def chosen_sizes(program: Program, batch: int | None = None, length: int | None = None) -> dict[str, int]:
    """Return the size of every dimension in the example, with batch and length replaced where given.

    Raises:
        UsageError: the program fixes the dimension, or the size is out of its range.

    """
    for name, size in (("batch", batch), ("length", length)):
        if size is None:
            continue
        if name not in program.dims:
            has = f"only {', '.join(program.dims.names)}" if program.dims.names else "its shapes are fixed"
            raise UsageError(f"The {name} cannot be {size}: {program.name} has no dynamic dimension {name!r} ({has}).")
        if not program.dims[name].admits(size):
            raise UsageError(f"The {name} cannot be {size}: {program.name} takes {program.dims[name]}.")
    return example_sizes(program, batch=batch, length=length)


def chosen_inputs(
    program: Program, batch: int | None = None, length: int | None = None, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return inputs at the chosen sizes: the example itself where it has them, else drawn from ``seed``, unpadded."""
    sizes = chosen_sizes(program, batch, length)
    if program.example_inputs and program.bind(program.example_inputs) == sizes:
        return dict(program.example_inputs)
    return sample_inputs(program, sizes, seed=seed)
