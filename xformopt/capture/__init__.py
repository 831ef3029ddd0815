"""Capture: a model in any of its forms -> a Program."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from xformopt.capture.dynamic import DynamicSpec
    from xformopt.capture.source import Source
    from xformopt.program import Program

__all__ = ["capture", "capture_source"]


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram | str | Path,
    example_inputs: object = None,
    dynamic: DynamicSpec | None = None,
) -> Program:
    """Capture a model as a Program.

    Args:
        model: A torch module; an ExportedProgram; or a MODEL string: a zoo name, a Hugging Face directory,
            ``package.module:factory``, a ``.pt2`` file or an artifact directory (which holds its captured Program).
        example_inputs: For a module: a dict of tensors by forward parameter, a tuple, or one tensor; None takes
            ``model.example_inputs()``.  A MODEL string brings its own.
        dynamic: For a module: names of varying axes, ``{"input_ids": {0: "batch", 1: ("length", 1, 512)}}``.
            None: batch, and length of integer inputs.

    Raises:
        CaptureError: with one paragraph that says what to change.
    """
    import torch

    from xformopt.capture.exporter import capture_exported, capture_module
    from xformopt.capture.source import check_finite
    from xformopt.errors import CaptureError

    if isinstance(model, str | Path):
        return capture_source(model)[0]
    if isinstance(model, torch.export.ExportedProgram):
        return capture_exported(model, None, None, None, "model")
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"A model is a torch module, an ExportedProgram or a name, not {type(model).__name__}.")
    if example_inputs is None:
        make_inputs = getattr(model, "example_inputs", None)
        if not callable(make_inputs):
            raise CaptureError(
                f"Example inputs are needed to capture {type(model).__name__}: pass them, or give the module a method "
                f"example_inputs()."
            )
        example_inputs = make_inputs()
    check_finite(model, type(model).__name__)
    return capture_module(model, example_inputs, dynamic)


def capture_source(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    length: int | None = None,
) -> tuple[Program, Source | None]:
    """Capture what a MODEL string names; returns the Program, and the Source it was captured from if there was one."""
    import torch

    from xformopt.capture.exporter import capture_exported, capture_module
    from xformopt.capture.resolve import ArtifactDirectory, resolve

    found = resolve(model, trust_remote_code=trust_remote_code, dtype=dtype, length=length)
    if isinstance(found, ArtifactDirectory):
        from xformopt.program import load_program

        return load_program(found.path / "program"), None
    if isinstance(found, torch.export.ExportedProgram):
        return capture_exported(found, None, None, None, Path(model).stem), None
    program = capture_module(
        found.module,
        found.example_inputs,
        found.dynamic,
        output_names=found.output_names,
        name=type(getattr(found.module, "model", found.module)).__name__,
    )
    return program, found


class _CallablePackage(types.ModuleType):
    """Importing a subpackage binds its name in the parent, where the function of the same name belongs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Program:
        return capture(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
