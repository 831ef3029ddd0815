"""A bundle measured over TVM's RPC: the device's clock, one connection, and a server that goes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from xformopt.bundle.pack import write_bundle
from xformopt.bundle.runner import remote
from xformopt.bundle.runner.__main__ import main
from xformopt.bundle.runner.remote import RemoteRunner, parse_address
from xformopt.errors import MeasurementError, UsageError
from xformopt.lowering import lower
from xformopt.measure.child import Child
from xformopt.program import Program
from xformopt.report.schema import BenchReport
from xformopt.report.side_by_side import side_by_side

pytest.importorskip("tvm")


class Server(NamedTuple):
    """A server in a process group of its own."""

    process: subprocess.Popen[bytes]
    address: str

    def kill(self) -> None:
        """End it with the process that serves the connection."""
        os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(small: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked bundle of two artifacts for TVM and one for ONNX Runtime."""
    path = tmp_path_factory.mktemp("rpc")
    targets = ("tvm-cpu", "tvm-x86-64-v3", "ort-cpu")
    for target in targets:
        lower(small, target, measure=False, sizes={"batch": 2, "length": 5}, captured=small).save(path / target)
    write_bundle([path / target for target in targets], path / "bundle.zip", batch=2, length=5)
    with zipfile.ZipFile(path / "bundle.zip") as archive:
        archive.extractall(path / "bundle")
    return path / "bundle"


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--port-end", str(port + 1)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    started = Server(process, f"127.0.0.1:{port}")
    for _ in range(600):
        # the address is taken, and the server not asked: it serves one client after the other
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield started
    if process.poll() is None:
        started.kill()
    process.wait()


@pytest.mark.slow
def test_artifacts_are_timed_on_the_device(folder: Path, server: Server, tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    options = ["--rpc", server.address, "--device", "a board", "--rounds", "2", "--threads", "1"]

    # what runs elsewhere than in TVM costs only itself
    assert main([*options, "--json", str(result)], folder) == 1

    report = BenchReport.from_json(result)
    assert report.machine.cpu == "a board"
    assert report.protocol["rpc"]
    first, second, third = report.runs
    for run in (first, second):
        assert run.error is None
        assert not run.partial
        assert run.latency_ms is not None
        assert run.fidelity is not None
        assert run.fidelity.relative_l2 is not None
        assert run.fidelity.relative_l2 < 1e-5
        # the memory of the process here is not that of the device
        assert run.peak_memory_bytes is None
    assert third.error is not None
    assert "for TVM alone" in third.error


def test_a_server_that_goes_away_leaves_what_was_measured(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    ask = Child.ask

    def watched(self: Child, command: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        asked.append(command)
        # before the third round of the first artifact, when each has had two
        if asked.count("round") == 5:
            server.kill()
        return ask(self, command, timeout=timeout, **arguments)

    monkeypatch.setattr(Child, "ask", watched)
    result = tmp_path / "bench.json"
    options = ["--rpc", server.address, "--only", "tvm-cpu", "--only", "tvm-x86-64-v3", "--rounds", "9"]

    assert main([*options, "--threads", "1", "--json", str(result)], folder) == 1

    report = BenchReport.from_json(result)
    for run in report.runs:
        assert run.partial
        assert run.error is None
        assert run.latency_ms is not None
        assert run.round_p50_ms is not None
        assert len(run.round_p50_ms) == 2
        assert "stopped after 2 of 9 rounds" in run.notes[-1]
    assert "stopped after 2 of 9 rounds" in capsys.readouterr().out
    beside = side_by_side([report, report])
    assert beside is not None
    assert all(run is not None and run.partial for run in beside.rows[0].runs)


def test_nobody_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert main(["--rpc", f"127.0.0.1:{port}", "--json", str(tmp_path / "out.json")], folder) == 1
    assert "tvm.exec.rpc_server" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_server_that_serves_someone_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.5)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        assert main(["--rpc", address, "--json", str(tmp_path / "out.json")], folder) == 1
    assert "serves one connection at a time" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("text", ["board", ":9090", "board:", "board:nine", "board:0", "board:70000"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="host:port"):
        parse_address(text)


def test_an_address_of_the_sixth_version() -> None:
    assert parse_address("[fe80::1]:9090") == ("fe80::1", 9090)


def test_only_tvm_is_behind_rpc(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="for openvino-cpu"):
        RemoteRunner("openvino-cpu", tmp_path, threads=1)
