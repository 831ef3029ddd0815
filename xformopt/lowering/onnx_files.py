"""ONNX models on disk: weights written lazily beside the graph, shared by candidates, confined to their folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from xformopt.errors import ArtifactError
from xformopt.files import staged_file
from xformopt.program.text import DTYPE_NAMES

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CandidateFolder", "check_external_data", "copy_onnx", "store_in_half", "write_onnx"]

# above this the weights lie beside the graph, where a session maps them instead of copying them
_SINGLE_FILE_BYTES = 32 << 20
# smaller tensors stay in the graph: shapes and scalars that a session wants to see while it optimizes
_KEPT_IN_GRAPH_BYTES = 1 << 10


def copy_onnx(model: Path, path: Path, overwrite: bool) -> None:
    """Write a model as a file of any name, with its weights beside it where they are large."""
    import onnx_ir as ir

    with staged_file(path, overwrite) as staged:
        write_onnx(ir.load(model), staged)


def write_onnx(model: ir.Model, path: Path) -> list[Path]:
    """Write a model, its weights in ``<name>.data`` where they are large; returns the files written."""
    import onnx_ir as ir

    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in weights) <= _SINGLE_FILE_BYTES:
        ir.save(model, path)
        return [path]
    data = path.with_name(f"{path.name}.data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_KEPT_IN_GRAPH_BYTES)
    return [path, data]


def store_in_half(model: ir.Model, dtype: torch.dtype) -> None:
    """Store what float32 weights a type of 16 bits holds exactly in that type; a session widens them as it loads."""
    import onnx_ir as ir
    from onnx_ir import tensor_adapters

    graph, casts = model.graph, []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.nbytes <= _KEPT_IN_GRAPH_BYTES:
            continue
        weight = torch.from_numpy(tensor.numpy())
        narrow = weight.to(dtype)
        if not torch.equal(narrow.float(), weight):
            continue
        own = f"{name}.{DTYPE_NAMES[dtype]}"
        kept = tensor_adapters.TorchTensor(narrow, name=own)
        stored = ir.Value(name=own, shape=value.shape, type=ir.TensorType(kept.dtype), const_value=kept)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        wide = cast.outputs[0]
        wide.type, wide.shape = value.type, value.shape
        value.replace_all_uses_with(wide)
        graph.initializers.pop(name)
        wide.name = name
        graph.initializers[own] = stored
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)


class CandidateFolder:
    """A folder of models built from one export: a weight they share is written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data = folder / "weights.data"
        self._data.touch()
        self._places: dict[int, ir.ExternalTensor] = {}
        # tensors are known by identity, so they must live as long as this folder
        self._kept: list[ir.TensorProtocol] = []
        self._count = 0

    def write(self, model: ir.Model) -> Path:
        """Write ``model`` and return its path; its weights now refer to the shared file."""
        import onnx_ir as ir

        with self._data.open("ab") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.nbytes > _KEPT_IN_GRAPH_BYTES:
                    value.const_value = self._place(tensor, file)
        self._count += 1
        path = self.folder / f"candidate-{self._count}.onnx"
        ir.save(model, path)
        return path

    def _place(self, tensor: ir.TensorProtocol, file: BinaryIO) -> ir.ExternalTensor:
        import onnx_ir as ir

        if (known := self._places.get(id(tensor))) is not None:
            return known
        offset = file.tell()
        tensor.tofile(file)  # type: ignore[attr-defined]
        placed = ir.ExternalTensor(
            self._data.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "weight",
            base_dir=self.folder,
        )
        self._places[id(tensor)] = placed
        self._kept.append(tensor)
        return placed


def check_external_data(path: Path) -> None:
    """Check that all a model refers to lies beside it, in files that are no links and long enough.

    Raises:
        ArtifactError: the model cannot be read, or refers to something outside of its folder or to missing bytes.

    """
    import onnx_ir as ir

    try:
        model = ir.load(path)
        tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
        for node in model.graph.all_nodes():
            tensors += [a.value for a in node.attributes.values() if a.type is ir.AttributeType.TENSOR]
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read as an ONNX model ({error}). Restore the file, or lower the model again."
        ) from error
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            _check_confined(path, tensor)


def _check_confined(path: Path, tensor: ir.ExternalTensor) -> None:
    location = os.fspath(tensor.location)
    file = path.parent / location
    where = f"The weight {tensor.name!r} of {path}"
    if Path(location).is_absolute() or ".." in Path(location).parts or "\\" in location:
        raise ArtifactError(
            f"{where} refers to {location!r}, outside of the model's folder; such a model is not opened. "
            f"Lower the model again, or get it from whom you trust."
        )
    if any(part.is_symlink() for part in (file, *file.parents) if part != path.parent and path.parent in part.parents):
        raise ArtifactError(
            f"{where} lies behind a link ({location}), which is not followed. Put the file itself there."
        )
    if not file.is_file():
        raise ArtifactError(
            f"{where} lies in {location}, which is missing. Copy that file too; it belongs to the model."
        )
    end = (tensor.offset or 0) + (tensor.length or 0)
    if end > file.stat().st_size:
        raise ArtifactError(f"{where} lies beyond the end of {location}: the file was cut short. Restore it.")
