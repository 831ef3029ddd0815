"""TVM sessions: a compiled library and its parameters, run on arrays; needs TVM's runtime and numpy alone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xformopt.errors import ArtifactError, MissingExtraError
from xformopt.lowering.tvm_signature import read_signature
from xformopt.measure.runner import OperatorTime

__all__ = ["PARAMETERS", "RUN_STATEFUL", "TvmSession", "read_parameters", "require_tvm"]

# runs a function of the virtual machine on inputs it was given before
RUN_STATEFUL = "invoke_stateful"
# what a hook of the virtual machine answers
_GO_ON = 0
# what kernels have in their names beside the operator
_SIZES = re.compile(r"_\d.*$")
# beside the library
PARAMETERS = ".npz"


def require_tvm(purpose: str) -> Any:
    """Import TVM, or raise MissingExtraError."""
    try:
        import tvm
    except ImportError as error:
        raise MissingExtraError("apache-tvm", "tvm", purpose) from error
    return tvm


def read_parameters(model: Path) -> Iterator[np.ndarray]:
    """Yield the parameters of a library, in order."""
    with np.load(model.with_name(model.name + PARAMETERS), allow_pickle=False) as archive:
        for name in archive.files:
            yield archive[name]


class TvmSession:
    """One model in TVM's virtual machine, at the sizes it was compiled for and those that are padded or cut to them.

    Raises:
        ArtifactError: the library cannot be loaded on this machine.
        MissingExtraError: TVM is not installed.

    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if threads is not None:
            # read when the first parallel loop makes the pool
            os.environ["TVM_NUM_THREADS"] = str(threads)
        tvm = require_tvm("Running an artifact for TVM")
        from tvm import relax

        self.path = path
        self._signature = read_signature(path)
        self.input_names, self.output_names = self._signature.inputs, self._signature.outputs
        device = tvm.cpu()
        try:
            library = tvm.runtime.load_module(os.fspath(path))
            self._machine: Any = relax.VirtualMachine(library, device)
        except Exception as error:
            raise ArtifactError(
                f"TVM {tvm.__version__} cannot load {path}: {' '.join(str(error).split())[:300]} "
                f"It may be made for another processor: lower the model again for this one."
            ) from error
        self._tensor = tvm.runtime.tensor
        self._parameters = [self._tensor(array) for array in read_parameters(path)]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once, or once for each part of a batch that was not compiled for.

        Raises:
            DataError: an input has a size that the library was not compiled for, and is not padded to one.

        """
        return self._signature.run(inputs, self._run_once)

    def _run_once(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        call = self._signature.choose(inputs)
        given = [self._tensor(np.ascontiguousarray(array)) for array in call.inputs]
        parameters = [self._parameters[index] for index in call.function.parameters]
        outputs = self._machine[call.function.name](*given, *parameters)
        return self._signature.cut(call, [output.numpy() for output in outputs])

    def profile(
        self, inputs: Mapping[str, np.ndarray], rounds: int, keep: Path | None = None
    ) -> tuple[list[OperatorTime], list[str]]:
        """Return the time of every kernel over ``rounds`` runs, longest first, and no falls back.

        Each call of a kernel is timed between two hooks of the virtual machine; nothing is written to ``keep``.
        """
        totals: dict[str, list[float]] = {}
        started = [0.0]

        def observe(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            if before:
                started[0] = time.perf_counter()
            else:
                totals.setdefault(name, []).append((time.perf_counter() - started[0]) * 1e3)
            return _GO_ON

        self._machine.set_instrument(observe)
        try:
            for _ in range(rounds):
                self.run(inputs)
        finally:
            # TVM offers no way to take an instrument off but to load the module anew
            self._machine.set_instrument(lambda *ignored: _GO_ON)
        times = [OperatorTime(name, _SIZES.sub("", name), sum(ms), len(ms)) for name, ms in totals.items()]
        return sorted(times, key=lambda item: -item.total_ms), []
