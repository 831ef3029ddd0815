"""Owns a child process that answers JSON commands: one line in, one line out, a time limit on each answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from xformopt.errors import MeasurementError

__all__ = ["Answering", "Child"]

_LAST_WORDS = 400


class Answering(Protocol):
    """What a contest asks: a process, or one candidate of a process that several share."""

    def ask(self, command: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Send a command and return the answer."""
        ...

    def close(self) -> None:
        """Say that nothing more is asked."""
        ...


class Child:
    """A Python module run in a process of its own, spoken to in JSON lines.

    Between its answers the child is stopped: idle threads of a runtime spin for a while after their last work, and
    would take a core from whoever is asked next.

    What the child writes to its standard error is kept aside; its last words go into the error if it dies.

    Args:
        module: What to run, by import path.
        environment: Variables set for the child beside those of this process.

    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        # -P: the current directory must not shadow installed packages
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **environment},
            text=True,
            encoding="utf-8",
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, command: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises:
            MeasurementError: The child answered with an error, died, or gave no answer in `timeout` seconds.

        """
        assert self._process.stdin is not None
        self._signal("SIGCONT")
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise MeasurementError(
                f'the process of this run gave no answer to "{command}" in {timeout:g} s and was stopped.'
            ) from None
        except OSError:
            line = None
        if line is None:
            raise MeasurementError(self._obituary(command))
        self._signal("SIGSTOP")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasurementError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process, kindly at first."""
        self._signal("SIGCONT")
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _signal(self, name: str) -> None:
        # only POSIX systems can stop a process; elsewhere the pause between rounds must do
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._answers.put(line)
        self._answers.put(None)

    def _obituary(self, command: str) -> str:
        try:
            status: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        words = f" Its last words: {self._last_words()}" if self._last_words() else ""
        hint = " Signal 9 is often the system running out of memory." if status == -9 else ""
        return f'the process of this run died of {how} while asked to "{command}".{hint}{words}'

    def _last_words(self) -> str:
        if self._stderr.closed:
            return ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[-_LAST_WORDS:] if lines else ""
