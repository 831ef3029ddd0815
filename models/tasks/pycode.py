"""Next-byte prediction on the source of the Python standard library."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn import functional

from xformopt.errors import XformoptError
from xformopt.models.tasks.task import Batch, Progress, Run, Score, Task, Tensors

__all__ = [
    "CONTEXT",
    "HELD_OUT",
    "MEASURED_DIGEST",
    "MEASURED_ON",
    "VOCABULARY",
    "PyCode",
    "far_repeats",
    "held_out_digest",
    "training_windows",
]

CONTEXT = 512
VOCABULARY = 256
# in every CPython from 3.11 on; none of them is a copy or a near copy of a module that is trained on
HELD_OUT = (
    "argparse.py",
    "asyncio/queues.py",
    "configparser.py",
    "csv.py",
    "email/message.py",
    "fractions.py",
    "heapq.py",
    "json/decoder.py",
    "logging/handlers.py",
    "queue.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "urllib/robotparser.py",
    "zipapp.py",
)
# the library the committed figures were measured on: another patch release has other bytes, so figures move a little
MEASURED_ON = "3.11.7"
MEASURED_DIGEST = "391964129ec3370f1eba90dac2a1eca988fc1e6e79e9422d47489621f5b30b82"
# tests, tables, texts, what only some distributions ship, and what is written when Python is built
_LEFT_OUT = {
    "__phello__",
    "__pycache__",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
_TEST_WINDOWS = 256
_BATCH = 16
_CALIBRATION_WINDOWS, _CALIBRATION_SEED = 64, 0
_VALIDATION_WINDOWS, _VALIDATION_SEED = 32, 1
_ORDER = 8
_FAR = 128


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _training_modules() -> list[str]:
    """Return the modules that are trained on, as paths below the library, in alphabetical order."""
    library = _library()
    names = (path.relative_to(library) for path in library.rglob("*.py"))
    return sorted(
        name.as_posix()
        for name in names
        if not _LEFT_OUT & set(name.parts)
        and not name.parts[0].startswith(("config-", "_sysconfigdata"))
        and name.as_posix() not in HELD_OUT
    )


def _read(modules: list[str] | tuple[str, ...]) -> bytes:
    """Return the modules one after the other, each ended by a zero byte."""
    try:
        return b"".join((_library() / name).read_bytes().replace(b"\r\n", b"\n") + b"\0" for name in modules)
    except OSError as error:
        raise XformoptError(
            f"The task pycode reads the source of the Python standard library below {_library()}, and {error.filename} "
            f"cannot be read ({error.strerror}). Use a Python that was installed with its library's source."
        ) from error


@cache
def _training_bytes() -> torch.Tensor:
    """Return ``[N]`` uint8, about 6 million."""
    return torch.frombuffer(bytearray(_read(_training_modules())), dtype=torch.uint8)


@cache
def _held_out_bytes() -> torch.Tensor:
    return torch.frombuffer(bytearray(_read(HELD_OUT)), dtype=torch.uint8)


def held_out_digest() -> str:
    """Return the SHA-256 of the held-out modules; ``MEASURED_DIGEST`` is that of the library the figures come from."""
    return hashlib.sha256(_held_out_bytes().numpy().tobytes()).hexdigest()


def training_windows(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``count`` windows of ``CONTEXT`` bytes anywhere in the training modules, ``[count, CONTEXT]`` int64."""
    source = _training_bytes()
    starts = torch.randint(len(source) - CONTEXT, (count, 1), generator=generator)
    return source[starts + torch.arange(CONTEXT)].long()


def far_repeats(window: bytes) -> list[bool]:
    """Say of each byte after the first whether only something far back foretells it.

    Byte t counts when the 8 bytes before it occurred earlier in the window, were followed there by a byte equal to
    byte t, that earlier follower lies more than 128 bytes before t, and the same 8 bytes were followed by nothing
    within the last 128 bytes (so that neither a local pattern nor a short attention window would do).
    """
    followers: dict[bytes, list[int]] = {}
    found = []
    for t in range(1, len(window)):
        earlier = followers.setdefault(window[max(t - _ORDER, 0) : t], []) if t >= _ORDER else []
        far = any(t - s > _FAR and window[s] == window[t] for s in earlier)
        near = any(t - s <= _FAR for s in earlier)
        found.append(far and not near)
        if t >= _ORDER:
            earlier.append(t)
    return found


@dataclass(frozen=True)
class PyCode(Task):
    """Bits per byte of a causal model on held-out modules of the Python standard library.

    An item is a window of 512 consecutive bytes; its 511 bytes after the first are predicted, each from all before it.
    ``details`` has the bits per byte on those that only a repeat more than 128 bytes back foretells
    (:func:`far_repeats`): what a model loses there, it loses of its long context.
    """

    name: ClassVar[str] = "pycode"
    summary: ClassVar[str] = "next-byte prediction on the source of the Python standard library"
    metric: ClassVar[str] = "bits per byte"
    higher_is_better: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("input_ids",)
    output: ClassVar[str] = "logits"

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return windows of modules that are trained on."""
        windows = training_windows(
            self.samples or _CALIBRATION_WINDOWS, torch.Generator().manual_seed(_CALIBRATION_SEED)
        )
        return [{"input_ids": part} for part in windows.split(_BATCH)]

    def test(self) -> Iterator[Batch]:
        """Yield windows at equal distances over the held-out modules."""
        source = _held_out_bytes()
        starts = torch.linspace(0, len(source) - CONTEXT, _TEST_WINDOWS, dtype=torch.float64).long()
        return _batches(source[starts[:, None] + torch.arange(CONTEXT)].long())

    def validation(self) -> Iterator[Batch]:
        """Yield other windows of modules that are trained on."""
        return _batches(training_windows(_VALIDATION_WINDOWS, torch.Generator().manual_seed(_VALIDATION_SEED)))

    def judge(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean bits per predicted byte of each window."""
        return _bits(output, batch.targets["next"]).mean(1), None

    def baselines(self) -> dict[str, float]:
        """Return what byte frequencies and byte pairs of the training modules give."""
        trained, tested = _training_bytes().long(), torch.cat([batch.inputs["input_ids"] for batch in self.test()])
        pairs = torch.bincount(trained[:-1] * VOCABULARY + trained[1:], minlength=VOCABULARY**2) + 0.01
        pairs = pairs.view(VOCABULARY, VOCABULARY).double()
        single = pairs.sum(0) / pairs.sum()
        paired = pairs / pairs.sum(1, keepdim=True)
        return {
            "byte frequencies": float(-single[tested[:, 1:]].log2().mean()),
            "byte pairs": float(-paired[tested[:, :-1], tested[:, 1:]].log2().mean()),
        }

    def evaluate(
        self,
        run: Run,
        progress: Progress = lambda what, done, total: None,
        batches: Iterable[Batch] | None = None,
    ) -> Score:
        """Run a model over batches (None: the test split); look apart at the bytes that only a far repeat foretells."""
        bits: list[torch.Tensor] = []
        far: list[torch.Tensor] = []

        def watched(inputs: Tensors) -> Tensors:
            outputs = run(inputs)
            windows = inputs["input_ids"]
            bits.append(_bits(outputs[self.output], windows[:, 1:]))
            far.append(torch.tensor([far_repeats(bytes(window)) for window in windows.to(torch.uint8).tolist()]))
            return outputs

        score = super().evaluate(watched, progress, batches)
        repeats = torch.cat(far)
        details = {
            "bits per byte on far repeats": float(torch.cat(bits)[repeats].mean()),
            "share of far repeats": float(repeats.double().mean()),
        }
        return Score(score.value, score.items, score.weights, details)


def _batches(windows: torch.Tensor) -> Iterator[Batch]:
    for part in windows.split(_BATCH):
        yield Batch({"input_ids": part}, {"next": part[:, 1:]})


def _bits(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Return what each predicted byte costs, ``[B, T-1]`` in bits, from logits ``[B, T, V]``."""
    predicted = logits[:, :-1].double().transpose(1, 2)
    return functional.cross_entropy(predicted, following, reduction="none") / math.log(2)
