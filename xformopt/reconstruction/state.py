"""What reconstruction keeps between runs: the results of finished blocks, and the training of the one under way."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xformopt.errors import OutputError
from xformopt.files import cache_folder, write_atomically

__all__ = ["State", "key_of"]

_VERSION = 3


def key_of(parts: Sequence[object], batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Return the name of a reconstruction: a hash of everything that decides its result."""
    digest = hashlib.blake2b(json.dumps([_VERSION, *parts], sort_keys=True, default=repr).encode(), digest_size=16)
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class State:
    """Files named by block in a folder named by the reconstruction; what cannot be read is computed again."""

    def __init__(self, key: str) -> None:
        self.folder = cache_folder() / "reconstruction" / key

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep tensors and facts under a name; a folder that cannot be written only costs time."""
        from safetensors.torch import save

        held = {key: value.detach().contiguous() for key, value in tensors.items()}
        try:
            write_atomically(self.folder / f"{name}.safetensors", save(held, {"facts": json.dumps(facts)}))
        except (OSError, OutputError):
            return

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the tensors and facts kept under a name, or None where there are none."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            content = (self.folder / f"{name}.safetensors").read_bytes()
            length = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + length])
            return load(content), json.loads(header["__metadata__"]["facts"])
        except (OSError, ValueError, KeyError, struct.error, SafetensorError):
            return None

    def forget(self, name: str) -> None:
        """Remove what is kept under a name."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
