"""Checkpoints of the zoo: safetensors files of 16-bit weights, read into fp32 modules tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from xformopt.errors import DataError
from xformopt.files import write_atomically

__all__ = ["MOST_BYTES", "load_checkpoint", "save_checkpoint"]

# a checkpoint is part of the package
MOST_BYTES = 4_000_000


def save_checkpoint(module: nn.Module, path: Path) -> None:
    """Write the parameters and persistent buffers of a module, those in fp32 as fp16.

    Raises:
        DataError: the file would be larger than a checkpoint may be, or a weight does not fit in fp16.
        OutputError: the file cannot be written.

    """
    from safetensors.torch import save

    tensors = {name: _stored(value) for name, value in module.state_dict().items()}
    if overflown := [
        name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()
    ]:
        raise DataError(f"The tensor {overflown[0]} has values that fp16 cannot hold. Train with a smaller rate.")
    data = save(tensors)
    if len(data) > MOST_BYTES:
        raise DataError(f"{path} would have {len(data):,} bytes, and may have {MOST_BYTES:,}. Take a smaller model.")
    write_atomically(path, data)


def load_checkpoint(module: nn.Module, path: Path) -> nn.Module:
    """Read a checkpoint into a module in place, and return the module.

    Raises:
        DataError: the file is missing or damaged, or does not fit; the message has the first tensor that differs.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"The checkpoint {path} is missing. Train it again, or install the package again.")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise DataError(f"The checkpoint {path} cannot be read: {error}. Restore the file.") from error
    wanted = module.state_dict()
    if difference := _first_difference(wanted, stored):
        raise DataError(
            f"The checkpoint {path} does not fit the configuration of {type(module).__name__}: {difference}. "
            "Restore the configuration it was trained with, or train it again."
        )
    module.load_state_dict({name: value.to(wanted[name].dtype) for name, value in stored.items()})
    return module


def _stored(value: torch.Tensor) -> torch.Tensor:
    kept = value.detach().contiguous().cpu()
    # a copy, since safetensors refuses tensors that share memory
    return kept.half() if kept.dtype == torch.float32 else kept.clone()


def _first_difference(wanted: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> str | None:
    """Tell the first tensor, in the module's order, that is missing, of another shape, or not finite."""
    for name, value in wanted.items():
        if name not in stored:
            return f"it lacks the tensor {name}, {list(value.shape)}"
        if stored[name].shape != value.shape:
            return f"the tensor {name} is {list(stored[name].shape)} instead of {list(value.shape)}"
        if stored[name].is_floating_point() and not stored[name].isfinite().all():
            return f"the tensor {name} has values that are not finite"
    if unknown := [name for name in stored if name not in wanted]:
        return f"it has a tensor {unknown[0]}, {list(stored[unknown[0]].shape)}, which the model does not"
    return None
