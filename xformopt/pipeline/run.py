"""The pipeline: runs passes, verifies each one, records what it did, and takes back what fails."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xformopt.errors import PassError, ProgramError, UsageError, VerificationError, XformoptError
from xformopt.lift import lifting_rules
from xformopt.pipeline.base import Context, Pass, PassResult, RewritePass
from xformopt.pipeline.failure import save_failure
from xformopt.pipeline.numeric import Case, Deviation, edge_cases, relative_l2, verify_regions
from xformopt.program import Level, Program, interpret, valid_positions
from xformopt.rewrite import Rule
from xformopt.verify import check

__all__ = ["Lift", "Pipeline", "PipelineResult", "Record", "describe"]

# end-to-end drift of an exact pass that leaves no record of single rewrites
_EXACT_DRIFT = 1e-5


@dataclass(frozen=True)
class Lift(RewritePass):
    """Rewrite a captured program in the xf dialect; the pipeline runs and verifies it like any pass, and first."""

    takes = Level.CAPTURED
    leaves = Level.LIFTED

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the rules of every operator family."""
        return lifting_rules(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply the rules; a model written in the dialect, in which none fires, is a lifted program all the same."""
        result = super().run(program, context)
        if result.changed:
            return result
        return replace(result, program=program.copy(level=self.leaves), changed=True)


@dataclass(frozen=True)
class Record:
    """What one pass did to the program.

    ``relative_l2`` compares the outputs with those before the pass, ``drift`` with those of the captured program, both
    as the worst over outputs and cases; ``local_l2`` is the worst of any single rewrite.  ``speedup`` is the interval
    of the measured ratio before / after, where it was measured.
    """

    name: str
    effect: str
    changed: bool
    fired: int
    rejected: tuple[tuple[str, int], ...]
    relative_l2: float
    drift: float
    local_l2: float
    seconds: float
    nodes: tuple[int, int]
    notes: tuple[str, ...] = ()
    dropped: str | None = None
    speedup: tuple[float, float] | None = None


@dataclass(frozen=True)
class PipelineResult:
    """The optimized program, the captured one it is compared with, and the record of every pass."""

    program: Program
    captured: Program
    history: tuple[Record, ...]


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes.

    Attributes:
        passes: Run in this order; a captured program is lifted first.
        max_drift: Largest relative L2 to the captured program that a lossy pass may reach, or, where a pass that
            recovers follows, that is left behind it; None: no budget.
        strict: A pass over its budget stops the run instead of being taken back.
        keep_if_faster: A lossy pass without a measured speed-up is taken back (needs ``measure`` in ``run``).
    """

    passes: Sequence[Pass] = ()
    max_drift: float | None = None
    strict: bool = False
    keep_if_faster: bool = False

    @staticmethod
    def recipe(name: str) -> Pipeline:
        """Return a recipe by its name (``exact``) or from a TOML file."""
        from xformopt.pipeline.recipes import load_recipe

        return Pipeline(load_recipe(name))

    def run(
        self,
        program: Program,
        calibration: Iterable[Mapping[str, torch.Tensor]] = (),
        target: str = "ort-cpu",
        *,
        seed: int = 0,
        assume: Iterable[str] = (),
        measure: Callable[[Program, Program], tuple[float, float]] | None = None,
        time: Callable[[Mapping[str, Program]], Mapping[str, float]] | None = None,
        score: Callable[[Program], float] | None = None,
        original: Program | None = None,
        observe: Callable[[Record, Program], None] | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> PipelineResult:
        """Run every pass on ``program`` and verify it.

        Args:
            program: A captured or lifted program.
            calibration: Batches of named inputs; the passes see them, and verification uses the first two.
            target: The target the program is meant for.
            seed: Seed of everything random.
            assume: Facts the caller vouches for, such as ``no-padding``.
            measure: Returns the interval of the speed-up of the second program over the first, on the target.
            time: Returns the milliseconds that programs take on the target, for passes that choose by time.
            score: Returns what a program reaches on held-out data of the task, higher is better, for passes that ask.
            original: What passes that recover accuracy aim for: lifted, with the inputs and outputs of ``program``; by
                default ``program`` itself.
            observe: Called after every pass with its record and the program it left.
            progress: Called with (what, done, total).

        Raises:
            UsageError: no pass asks for an assumed fact.
            VerificationError: an exact pass changed the function; both sides of the rewrite are saved.
            PassError: a pass failed, or left an invalid program.
        """
        assumed = frozenset(assume)
        self._check_assumptions(assumed)
        batches = tuple(dict(batch) for batch in calibration)
        for batch in batches:
            program.bind(batch)
        context = Context(batches, target, seed, assumed, progress, time, measure, score, original)
        steps: list[Pass] = [*([Lift()] if program.level == Level.CAPTURED else []), *self.passes]
        run = _Run(self, context, measure, program, edge_cases(program, batches, seed=seed))
        if original is None:
            run.take_as_original()
        for index, step in enumerate(steps):
            progress(step.name, index, len(steps))
            run.recovery_ahead = any(later.recovers for later in steps[index + 1 :])
            record = run.step(step)
            if original is None and isinstance(step, Lift):
                run.take_as_original()
            if observe is not None:
                observe(record, run.program)
        progress("done", len(steps), len(steps))
        return PipelineResult(run.program, program, tuple(run.history))

    def _check_assumptions(self, assumed: frozenset[str]) -> None:
        asked = sorted({fact for step in self.passes for fact in step.assumptions})
        if unknown := sorted(assumed - set(asked)):
            raise UsageError(
                f"No pass asks whether {' or '.join(map(repr, unknown))} holds, so that assuming it says nothing. "
                f"Facts that these passes ask for: {', '.join(asked) or 'none'}."
            )


@dataclass(frozen=True)
class _Checkpoint:
    """A program to go back to, its outputs, and how many passes had run."""

    program: Program
    outputs: list[dict[str, torch.Tensor]]
    passes: int


@dataclass
class _Run:
    """One run: the current program, the reference outputs, the history.

    ``within_budget`` is where the run goes back to if recovery fails to mend what went over the budget since.
    """

    pipeline: Pipeline
    context: Context
    measure: Callable[[Program, Program], tuple[float, float]] | None
    program: Program
    cases: list[Case]
    history: list[Record] = field(default_factory=list)
    recovery_ahead: bool = False
    within_budget: _Checkpoint | None = None

    def __post_init__(self) -> None:
        self.captured = [case.captured for case in self.cases]
        self.current = self.captured

    def take_as_original(self) -> None:
        """Let the current program be what lossy passes are to stay close to."""
        self.context = replace(self.context, original=self.program)

    def step(self, step: Pass) -> Record:
        """Run one pass; on success the current program is its result."""
        started = time.perf_counter()
        self._check_level(step)
        result = self._run_pass(step)
        before = self.program
        if not result.changed:
            record = self._record(step, result, started)
        else:
            record = self._verify(step, result, started)
            if record.dropped is None and step.effect != "exact":
                record = self._judge_lossy(step, record, before, result.program)
            if record.dropped is None:
                self.program, self.current = result.program, self.outputs
        self.history.append(record)
        if self.within_budget is not None and not self.recovery_ahead:
            self._judge_recovered(self.within_budget)
        return self.history[-1]

    def _check_level(self, step: Pass) -> None:
        levels = list(Level)
        if levels.index(self.program.level) < levels.index(step.takes):
            raise PassError(
                f"The pass {step.name} takes a {step.takes} program, but this one is {self.program.level}. Let the "
                f"pipeline lift it first."
            )

    def _run_pass(self, step: Pass) -> PassResult:
        earlier = ", ".join(record.name for record in self.history) or "none"
        try:
            result = step.run(self.program, self.context)
        except XformoptError:
            raise
        except Exception as error:
            raise PassError(
                f"The pass {step.name} failed with {type(error).__name__}: {error} (passes before it: {earlier})."
            ) from error
        if result.changed:
            try:
                check(result.program)
            except ProgramError as error:
                raise PassError(
                    f"The pass {step.name} left the program invalid: {error} (passes before it: {earlier})."
                ) from error
        return result

    def _verify(self, step: Pass, result: PassResult, started: float) -> Record:
        local = 0.0
        if step.effect == "exact":
            for case in self.cases:
                deviation, worst = verify_regions(self.program, result.fired, case)
                local = max(local, worst)
                if deviation is not None:
                    raise self._deviates(step, deviation)
        self.outputs = [interpret(result.program, case.inputs) for case in self.cases]
        record = replace(
            self._record(step, result, started),
            relative_l2=self._distance(self.current),
            drift=self._distance(self.captured),
            local_l2=local,
        )
        if step.effect == "exact" and not result.fired and record.relative_l2 > _EXACT_DRIFT:
            raise VerificationError(
                f"The exact pass {step.name} changed the outputs by a relative L2 of {record.relative_l2:.1e} "
                f"(allowed: {_EXACT_DRIFT:.0e}). It was taken back; the program before it is intact."
            )
        return record

    def _deviates(self, step: Pass, deviation: Deviation) -> VerificationError:
        folder: Path | None = save_failure(step.name, deviation)
        saved = f" Both sides and the values that show it are in {folder}." if folder else ""
        return VerificationError(
            f"The exact pass {step.name} changed what {deviation.fired.path} computes: its rewrite "
            f"{deviation.fired.rule} deviates by a relative L2 of {deviation.relative_l2:.1e} on {deviation.case}. "
            f"The pass was taken back.{saved}"
        )

    def _judge_lossy(self, step: Pass, record: Record, before: Program, after: Program) -> Record:
        budget = self.pipeline.max_drift
        if budget is not None and record.drift > budget:
            reason = f"its drift of {record.drift:.2e} is over the budget of {budget:.2e}"
            if not self.recovery_ahead:
                if self.pipeline.strict:
                    raise VerificationError(f"The pass {record.name} was taken back and the run stopped: {reason}.")
                return replace(record, dropped=reason)
            if self.within_budget is None:
                self.within_budget = _Checkpoint(before, self.current, len(self.history))
            record = replace(record, notes=(*record.notes, f"{reason}, and is judged again behind recovery"))
        if self.measure is None or not step.aims_at_time:
            return record
        low, high = self.measure(before, after)
        record = replace(record, speedup=(low, high))
        if low > 1:
            return record
        reason = f"it buys no measured time on {self.context.target} (speed-up {low:.2f} to {high:.2f})"
        if self.pipeline.keep_if_faster:
            return replace(record, dropped=reason)
        return replace(record, notes=(*record.notes, reason))

    def _judge_recovered(self, last_good: _Checkpoint) -> None:
        """Go back to the last program within the budget, unless recovery came back to it."""
        self.within_budget = None
        budget, drift = self.pipeline.max_drift, self._distance(self.captured, self.current)
        assert budget is not None
        if drift <= budget:
            return
        reason = f"the drift behind recovery, {drift:.2e}, is still over the budget of {budget:.2e}"
        if self.pipeline.strict:
            raise VerificationError(f"The run stopped: {reason}.")
        self.program, self.current = last_good.program, last_good.outputs
        for place in range(last_good.passes, len(self.history)):
            if self.history[place].changed and self.history[place].dropped is None:
                self.history[place] = replace(self.history[place], dropped=reason)

    def _record(self, step: Pass, result: PassResult, started: float) -> Record:
        reasons = Counter(refusal.reason for refusal in result.rejected)
        return Record(
            name=step.name,
            effect=step.effect,
            changed=result.changed,
            fired=len(result.fired),
            rejected=tuple(reasons.most_common()),
            relative_l2=0.0,
            drift=self._distance(self.captured, self.current),
            local_l2=0.0,
            seconds=time.perf_counter() - started,
            nodes=(_count(self.program), _count(result.program)),
            notes=result.notes,
        )

    def _distance(
        self, reference: list[dict[str, torch.Tensor]], outputs: list[dict[str, torch.Tensor]] | None = None
    ) -> float:
        """Return the worst relative L2 over the captured program's outputs and all cases, on valid positions."""
        values = {
            spec.name: node.meta["val"] for spec, node in zip(self.program.outputs, self.program.results, strict=True)
        }
        worst = 0.0
        for case, wanted, have in zip(self.cases, reference, outputs or self.outputs, strict=True):
            for name in wanted:
                fake = values[name]
                valid = valid_positions(self.program, fake, case.inputs)
                worst = max(worst, relative_l2(wanted[name], have[name], valid))
        return worst


def _count(program: Program) -> int:
    return sum(1 for _ in program.nodes())


def describe(record: Record) -> dict[str, Any]:
    """Return a record in the form of the JSON contract of ``optimize --json``."""
    return {
        "name": record.name,
        "effect": record.effect,
        "changed": record.changed,
        "fired": record.fired,
        "rejected": [{"reason": reason, "count": count} for reason, count in record.rejected],
        "relative_l2": record.relative_l2,
        "seconds": record.seconds,
        "drift": record.drift,
        "local_l2": record.local_l2,
        "nodes": list(record.nodes),
        "notes": list(record.notes),
        "dropped": record.dropped,
        "speedup": list(record.speedup) if record.speedup else None,
    }
