"""Which form of each operator is fastest here: whole sessions timed against each other, one operator at a time.

The answer is kept for each machine, program structure and size in the cache folder.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xformopt.errors import ArtifactError
from xformopt.lowering.manifest import SessionSettings, TuningRecord
from xformopt.lowering.onnx_export import Exported
from xformopt.lowering.onnx_files import CandidateFolder
from xformopt.lowering.onnx_forms import build_graph, offered_forms
from xformopt.lowering.ort_session import OrtSession
from xformopt.lowering.reference import largest_gap
from xformopt.lowering.tuning_cache import choices_file, write_choices
from xformopt.measure.machine import describe_machine
from xformopt.program.text import canonical_text

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Progress", "Tuned", "choose_forms"]

Progress = Callable[[str, int, int], None]

# a form must beat the one kept until then by this much, and in this share of the rounds; twice, in sessions opened
# anew: where a session's memory happens to lie changes its time by about two percent for as long as it lives
_WORTH = 0.98
_MOST = 0.75
_ROUNDS = 21
# a form that is not faster after a few rounds is not worth the rest
_HOPELESS = 1.0
_FEW_ROUNDS = 5
_SECONDS_EACH = 2.0
# a call this long needs no other before it to fill the caches
_LONG_CALL = 0.03
# what matters most comes first, should time run out
_FIRST = ("attention", "linear", "activation", "add_layer_norm", "add_rms_norm", "rope")
_TUNING_VERSION = 2


@dataclass(frozen=True)
class Tuned:
    """The forms to use, and how they were found."""

    forms: dict[str, str] = field(default_factory=dict)
    records: tuple[TuningRecord, ...] = ()


def choose_forms(
    exported: Exported,
    inputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    settings: SessionSettings,
    threads: int,
    tolerance: float,
    seconds: float,
    progress: Progress,
    target: str = "ort-cpu",
) -> Tuned:
    """Return the fastest form of every operator for ``inputs`` on this machine.

    Args:
        exported: The export to build candidates from.
        inputs: Named inputs at the sizes to choose for.
        expected: The eager program's outputs for them; a candidate that differs is not timed.
        settings: What sessions are told.
        threads: Threads of a session; with one, processor time is compared, which other processes do not disturb.
        tolerance: Largest relative L2 of a candidate.
        seconds: When to stop trying further forms.
        progress: Called with (what, done, total).
        target: ``ort-cpu`` or ``ort-cuda``.

    """
    key = _cache_key(exported, inputs, settings, threads, target)
    if (known := _read_cache(key)) is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="xformopt-") as folder:
        search = _Search(exported, inputs, expected, Path(folder), settings, threads, tolerance, target)
        tuned = search.run(time.monotonic() + seconds, progress)
    _write_cache(key, tuned)
    return tuned


class _Search:
    """A greedy search: one operator after the other, each form against the best until then."""

    def __init__(
        self,
        exported: Exported,
        inputs: Mapping[str, torch.Tensor],
        expected: Mapping[str, torch.Tensor],
        folder: Path,
        settings: SessionSettings,
        threads: int,
        tolerance: float,
        target: str,
    ) -> None:
        self.exported, self.inputs, self.expected = exported, inputs, expected
        self.arrays = {name: value.numpy() for name, value in inputs.items()}
        self.candidates = CandidateFolder(folder)
        self.settings, self.threads, self.tolerance, self.target = settings, threads, tolerance, target
        # what a GPU does takes no time of the processor
        self.clock = time.process_time if threads == 1 and target == "ort-cpu" else time.perf_counter
        self.seen: set[str] = set()

    def run(self, deadline: float, progress: Progress) -> Tuned:
        forms: dict[str, str] = {}
        records: list[TuningRecord] = []
        best = self._open({})
        assert best is not None
        offered = offered_forms(self.exported, on_gpu=self.target == "ort-cuda")
        order = sorted(offered, key=lambda operator: ((*_FIRST, operator)).index(operator))
        trials = [(operator, name) for operator in order for name in offered[operator][1:]]
        for done, (operator, form) in enumerate(trials):
            progress(f"timing {operator} as {form}", done, len(trials))
            if time.monotonic() > deadline:
                records.append(TuningRecord(operator=operator, form=form, note="not timed: out of time"))
                continue
            record, rival = self._try(operator, {**forms, operator: form}, best)
            records.append(record)
            if record.kept and rival is not None:
                forms[operator], best = form, rival
        progress("timing forms", len(trials), len(trials))
        return Tuned(forms, tuple(records))

    def _try(self, operator: str, forms: Mapping[str, str], best: OrtSession) -> tuple[TuningRecord, OrtSession | None]:
        base = TuningRecord(operator=operator, form=forms[operator])
        try:
            rival = self._open(forms)
        except ArtifactError as error:
            return base.model_copy(update={"note": f"not timed: {error}"}), None
        if rival is None:
            return base.model_copy(update={"note": "not timed: the same graph as before"}), None
        try:
            found = rival.run(self.arrays)
        except Exception as error:
            return base.model_copy(update={"note": f"not timed: it failed ({error})"}), None
        name, gap = largest_gap(self.exported.program, self.inputs, self.expected, found)
        if not gap <= self.tolerance:
            note = f"not timed: {name} differs by {gap:.1e}"
            return base.model_copy(update={"relative_l2": gap, "note": note}), None
        ratio, kept = self._compare(best, rival)
        if kept:
            best.reopen()
            rival.reopen()
            again, kept = self._compare(best, rival)
            ratio = max(ratio, again)
        return base.model_copy(update={"ratio": round(ratio, 4), "relative_l2": gap, "kept": kept}), rival

    def _open(self, choice: Mapping[str, str]) -> OrtSession | None:
        model = build_graph(self.exported, choice, on_gpu=self.target == "ort-cuda").model
        if (shape := _structure(model)) in self.seen:
            return None
        self.seen.add(shape)
        path = self.candidates.write(model)
        return OrtSession(path, self.settings, threads=self.threads, is_rival=True, target=self.target)

    def _compare(self, best: OrtSession, rival: OrtSession) -> tuple[float, bool]:
        """Return the rival's time over the best's (median of rounds), and whether it is clearly faster."""
        for session in (best, rival):
            session.run(self.arrays)
        ratios: list[float] = []
        stop = time.monotonic() + _SECONDS_EACH
        with _no_garbage_collection():
            while len(ratios) < _FEW_ROUNDS or (len(ratios) < _ROUNDS and time.monotonic() < stop):
                if len(ratios) >= _FEW_ROUNDS and np.median(ratios) > _HOPELESS:
                    break
                # who goes first alternates, so that what the other left in the caches charges both
                order = (best, rival) if len(ratios) % 2 else (rival, best)
                taken = {id(session): self._time(session) for session in order}
                ratios.append(taken[id(rival)] / taken[id(best)])
        ratio, share = float(np.median(ratios)), float(np.mean(np.asarray(ratios) < 1))
        return ratio, ratio < _WORTH and share >= _MOST

    def _time(self, session: OrtSession) -> float:
        start = self.clock()
        session.run(self.arrays)
        settling = self.clock() - start
        if settling > _LONG_CALL:
            return settling
        start = self.clock()
        session.run(self.arrays)
        return self.clock() - start


def _structure(model: ir.Model) -> str:
    """Return a hash of what a graph computes, whatever its nodes are called."""
    numbers: dict[Any, int] = {}
    digest = hashlib.blake2b(digest_size=16)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        numbers[value] = len(numbers)
    for node in model.graph:
        read = [None if value is None else numbers[value] for value in node.inputs]
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        initializers = [value.name for value in node.inputs if value is not None and value.is_initializer()]
        digest.update(repr((node.domain, node.op_type, read, initializers, attributes)).encode())
        for value in node.outputs:
            numbers[value] = len(numbers)
    return digest.hexdigest()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _cache_key(
    exported: Exported, inputs: Mapping[str, torch.Tensor], settings: SessionSettings, threads: int, target: str
) -> str:
    machine = describe_machine()
    offered = offered_forms(exported)
    parts = [
        _TUNING_VERSION,
        canonical_text(exported.program)[0],
        {name: list(value.shape) for name, value in inputs.items()},
        {"cpu": machine.cpu, "isa": machine.isa, "cores": machine.cores, "packages": machine.packages},
        offered,
        settings.model_dump(),
        threads,
        *([target, _gpu()] if target == "ort-cuda" else []),
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "unknown to torch"


def _read_cache(key: str) -> Tuned | None:
    try:
        stored = json.loads(choices_file(f"{key}.json").read_text(encoding="utf-8"))
        records = tuple(TuningRecord.model_validate(record) for record in stored["records"])
        return Tuned(dict(stored["forms"]), records)
    except (OSError, ValueError, KeyError, TypeError):
        # a damaged answer is found again
        return None


def _write_cache(key: str, tuned: Tuned) -> None:
    write_choices(f"{key}.json", {"forms": tuned.forms, "records": [record.model_dump() for record in tuned.records]})
