"""Runs the artifacts of a bundle on another machine over TVM's RPC, and times them there.

On the device runs ``python -m tvm.exec.rpc_server``, which serves one connection at a time.  So one process here holds
the connection and every artifact opened over it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from xformopt.errors import MeasurementError, UsageError, XformoptError
from xformopt.lowering.tvm_session import RUN_STATEFUL, read_parameters, require_tvm
from xformopt.lowering.tvm_signature import Call, read_signature
from xformopt.measure.child import Child
from xformopt.measure.contest import BenchSettings, Candidate, Contest, Entry, Progress
from xformopt.measure.runner import Array, OperatorTime

__all__ = ["RemoteContest", "RemoteRunner", "describe_remote", "open_runner", "parse_address"]

# how long a server may take to answer a call
CONNECT_SECONDS = 60.0
# how the process that holds the connection learns where to
_ADDRESS = "XFORMOPT_RPC"
# a round has at least so many samples, as one of this machine has
_FEWEST_SAMPLES, _MOST_SAMPLES = 1, 200


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        UsageError: the text is not ``host:port``.

    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--rpc takes host:port, such as 192.168.1.20:9090, and {text!r} is not that.")
    return host.strip("[]"), int(port)


class RemoteContest(Contest):
    """A contest on another machine: all candidates live in one process here, which holds the connection.

    A candidate that fails once it was timed keeps the rounds it has, and is marked as stopped: the server went away.

    Args:
        candidates: What to measure.
        settings: As for any contest.
        progress: As for any contest.
        address: ``host:port`` of TVM's RPC server.

    """

    def __init__(
        self, candidates: Sequence[Candidate], settings: BenchSettings, progress: Progress, address: str
    ) -> None:
        super().__init__(candidates, settings, progress)
        self._address = address
        self._child: Child | None = None
        self._names = map(str, itertools.count())

    def hold(
        self,
        inputs: Mapping[str, Array],
        reference: Mapping[str, Array] | None = None,
        valid: Mapping[str, Array] | None = None,
    ) -> None:
        """Go through all phases over one connection."""
        self._child = Child(self.settings.worker, {_ADDRESS: self._address})
        try:
            super().hold(inputs, reference, valid)
        finally:
            self._child.close()

    def _spawn(self) -> _Share:
        assert self._child is not None
        return _Share(self._child, next(self._names))

    @contextmanager
    def _blamed_on(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except (MeasurementError, OSError) as error:
            if entry.rounds:
                entry.stopped = str(error)
            else:
                entry.error = str(error)


class _Share:
    """One candidate of the process that several share."""

    def __init__(self, child: Child, name: str) -> None:
        self._child, self._name = child, name

    def ask(self, command: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        return self._child.ask(command, timeout=timeout, run=self._name, **arguments)

    def close(self) -> None:
        """Leave the process to the others."""


class RemoteRunner:
    """An artifact for TVM on the machine behind a connection.

    Raises:
        MeasurementError: the target does not run in TVM, or the device does not take the library.

    """

    def __init__(self, target: str, path: Path, *, threads: int) -> None:
        if not target.startswith("tvm-"):
            raise MeasurementError(
                f"TVM's RPC runs artifacts for TVM alone, and this one is for {target}: run it on the device itself, "
                f"or leave it out with --only."
            )
        manifest = json.loads((path / "artifact.json").read_text(encoding="utf-8"))
        model = path / manifest["model"]
        self._signature = read_signature(model)
        self.target, self.precision = target, str(manifest["precision"])
        self.input_names, self.output_names = self._signature.inputs, self._signature.outputs
        self.size_bytes = sum(part.stat().st_size for part in model.parent.glob(f"{model.name}*"))
        self.fallbacks: list[str] = []
        remote = _kept_connection(os.environ[_ADDRESS])
        tvm = require_tvm("Measuring over RPC")
        from tvm import relax

        self._device, self._tensor = remote.cpu(), tvm.runtime.tensor
        # files of several artifacts lie in one folder there
        sent = f"{path.name}-{model.name}"
        with _on_device("loading"):
            remote.get_function("runtime.config_threadpool")(1, threads)
            remote.upload(os.fspath(model), sent)
            self._machine: Any = relax.VirtualMachine(remote.load_module(sent), self._device)
            self._parameters = [self._tensor(array, self._device) for array in read_parameters(model)]
        self._held: tuple[Mapping[str, np.ndarray], Call] | None = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; inputs that were sent before are not sent again."""
        with _on_device("running"):
            call = self._send(inputs)
            self._machine.invoke_stateful(call.function.name)
            outputs = self._machine.get_outputs(call.function.name)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return self._signature.cut(call, [output.numpy() for output in outputs])

    def time_round(self, inputs: Mapping[str, np.ndarray], min_seconds: float) -> list[float]:
        """Return samples in milliseconds by the device's clock, ``min_seconds`` of them: the way there is left out."""
        with _on_device("timing"):
            name = self._send(inputs).function.name
            timed = self._timed(name, 1)[0]
            wanted = math.ceil(1e3 * min_seconds / max(timed, 1e-3))
            return self._timed(name, min(max(wanted, _FEWEST_SAMPLES), _MOST_SAMPLES))

    def profile(self, inputs: Mapping[str, np.ndarray], rounds: int) -> list[OperatorTime] | None:
        """Tell nothing: hooks do not reach over the connection."""
        return None

    def _timed(self, function: str, samples: int) -> list[float]:
        evaluator = self._machine.time_evaluator(RUN_STATEFUL, self._device, number=1, repeat=samples)
        return [1e3 * seconds for seconds in evaluator(function).results]

    def _send(self, inputs: Mapping[str, np.ndarray]) -> Call:
        if self._held is None or self._held[0] is not inputs:
            call = self._signature.choose(inputs)
            given = [self._tensor(np.ascontiguousarray(array), self._device) for array in call.inputs]
            parameters = [self._parameters[index] for index in call.function.parameters]
            self._machine.set_input(call.function.name, *given, *parameters)
            self._held = inputs, call
        return self._held[1]


def open_runner(target: str, path: Path, *, threads: int, profile_to: Path | None = None) -> RemoteRunner:
    """Open the artifact in the folder ``path`` on the machine that is connected to."""
    return RemoteRunner(target, path, threads=threads)


def describe_remote(address: str, device: str | None) -> dict[str, Any]:
    """Return what the bench JSON says of the machine: what TVM there tells, and ``device``, how the user calls it.

    Raises:
        MeasurementError: nothing answers at ``address``.

    """
    # dropped on the way out: the server takes the next connection once this one is gone
    remote = _connect(address)
    told = {}
    for name, function in (("cpu", "target.llvm_get_system_cpu"), ("triple", "target.llvm_get_system_triple")):
        try:
            told[name] = str(remote.get_function(function)())
        except Exception:
            # a runtime without its compiler does not know
            continue
    architecture = told.get("triple", "").partition("-")[0] or None
    return {"cpu": device or told.get("cpu") or "a device over RPC", "architecture": architecture, "peaks": None}


@cache
def _kept_connection(address: str) -> Any:
    return _connect(address)


def _connect(address: str) -> Any:
    tvm = require_tvm("Measuring over RPC")
    from tvm import rpc

    host, port = parse_address(address)
    # a server that serves someone else takes the call and says nothing, and TVM would wait for ever
    answer: Future[Any] = Future()

    def call() -> None:
        try:
            answer.set_result(rpc.connect(host, port))
        except Exception as error:
            answer.set_exception(error)

    Thread(target=call, daemon=True).start()
    try:
        return answer.result(CONNECT_SECONDS)
    except TimeoutError as error:
        raise MeasurementError(
            f"The RPC server at {address} has not answered for {CONNECT_SECONDS:g} s. It serves one connection at a "
            f"time: end the other one, or start the server again."
        ) from error
    except Exception as error:
        raise MeasurementError(
            f"no RPC server of TVM {tvm.__version__} answers at {address} ({_first_line(error)}). Start one on the "
            f"device: python -m tvm.exec.rpc_server --host 0.0.0.0 --port {port}"
        ) from error


@contextmanager
def _on_device(doing: str) -> Iterator[None]:
    """Turn TVM's errors into a paragraph."""
    try:
        yield
    except XformoptError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"{doing} over RPC failed: {_first_line(error)}. Either the server went away, or the library is made for "
            f"another processor than the device's."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
