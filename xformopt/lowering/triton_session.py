"""Sessions of AOTInductor packages: loaded and run with torch alone, on the GPU they were compiled for."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xformopt.errors import ArtifactError, DataError
from xformopt.measure.runner import OperatorTime

__all__ = ["LEAST_CAPABILITY", "SIGNATURE", "TritonSession", "missing_gpu"]

# the first with bfloat16 and asynchronous copies
LEAST_CAPABILITY = (8, 0)
# beside the package: the names and shapes of what it takes and returns, and what it was compiled for
SIGNATURE = ".json"
_PROFILE_WARMUP = 2


def missing_gpu() -> str:
    """Say which GPU is missing here, or nothing."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU here"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has the compute capability {_dotted(found)}, and the kernels need "
            f"{_dotted(LEAST_CAPABILITY)} (Ampere) or later"
        )
    return ""


class TritonSession:
    """One package, at any sizes within its bounds.

    Raises:
        ArtifactError: the package is damaged, there is no GPU, or it was compiled for another.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            signature = json.loads(path.with_name(path.name + SIGNATURE).read_text(encoding="utf-8"))
            self.input_names, self.output_names = tuple(signature["inputs"]), tuple(signature["outputs"])
            self._inputs: dict[str, list[list[int | None]]] = signature["inputs"]
            self.device: str = signature["device"]
            capability = signature["capability"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path.name}{SIGNATURE} belongs beside {path} and cannot be read: {error}. Lower the model again."
            ) from error
        if self.device == "cuda":
            _check_gpu(path, capability)
        if not zipfile.is_zipfile(path):
            raise ArtifactError(f"{path} is no package of AOTInductor: it was cut short or replaced. Lower it again.")
        try:
            self._package: Any = torch._inductor.aoti_load_package(os.fspath(path))
        except Exception as error:
            raise ArtifactError(
                f"torch {torch.__version__} cannot load {path}, which torch {signature.get('torch')} wrote: "
                f"{' '.join(str(error).split())[:300]} Lower the model again with this version."
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once: arrays go to the GPU and come back.

        Raises:
            DataError: an input has a size that the package was not compiled for.

        """
        given = [torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self.device) for name in self.input_names]
        return {name: _array(value) for name, value in zip(self.output_names, self.call(given), strict=True)}

    def call(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run once on tensors of the device, in the order of ``input_names``; nothing is copied or waited for.

        Raises:
            DataError: as :meth:`run`.

        """
        for name, tensor in zip(self.input_names, tensors, strict=True):
            for axis, (low, high) in enumerate(self._inputs[name]):
                size = tensor.shape[axis]
                if size < (low or 0) or (high is not None and size > high):
                    raise DataError(
                        f"Axis {axis} of {name} is {size}, and {self.path.name} was compiled for {low} to {high}. "
                        f"Lower the model with a wider range, or cut the input."
                    )
        outputs = self._package(*tensors)
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

    def profile(
        self, inputs: Mapping[str, np.ndarray], rounds: int, keep: Path | None = None
    ) -> tuple[list[OperatorTime], list[str]]:
        """Return the time of every kernel on the device over ``rounds`` runs, longest first, and no falls back.

        ``keep``: a folder for torch's own profile.
        """
        from torch.profiler import ProfilerActivity, profile

        for _ in range(_PROFILE_WARMUP):
            self.run(inputs)
        activity = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as taken:
            for _ in range(rounds):
                self.run(inputs)
        if keep is not None:
            taken.export_chrome_trace(os.fspath(keep / "triton-trace.json"))
        times = [
            OperatorTime(event.key, event.key, _microseconds(event, self.device) / 1e3, event.count)
            for event in taken.key_averages()
        ]
        return sorted(times, key=lambda time: -time.total_ms), []


def _check_gpu(path: Path, capability: list[int]) -> None:
    if why_not := missing_gpu():
        raise ArtifactError(
            f"{path} was compiled for an NVIDIA GPU of compute capability {_dotted(capability)}, and {why_not}. "
            f"Run it on such a machine, or lower the model for another target."
        )
    here = torch.cuda.get_device_capability()
    if list(here) != list(capability):
        raise ArtifactError(
            f"{path} was compiled for GPUs of compute capability {_dotted(capability)}, and "
            f"{torch.cuda.get_device_name()} has {_dotted(here)}. Lower the model again on this machine."
        )


def _dotted(capability: Any) -> str:
    return ".".join(map(str, capability))


def _array(value: torch.Tensor) -> np.ndarray:
    value = value.detach().cpu()
    # NumPy has no such type
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _microseconds(event: Any, device: str) -> float:
    return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)
