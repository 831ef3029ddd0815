"""The training of one block: its loss, its steps, and how it is interrupted and taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xformopt.match import is_call, xf
from xformopt.program import Program, valid_positions, value_of
from xformopt.reconstruction.blocks import Block
from xformopt.reconstruction.settings import Settings
from xformopt.reconstruction.state import State
from xformopt.reconstruction.values import Store, Transform, run_block
from xformopt.reconstruction.variables import Variable

__all__ = ["Attempt", "Job", "Objective", "Place", "Training", "squared_error"]

# the penalty's weight, the share of the steps before it sets in, and how beta falls from there
_LAMBDA, _WARMUP, _BETA = 10.0, 0.2, (20.0, 2.0)
_FEWEST_STEPS, _TIMED_STEPS = 20, 4
_SECONDS_BETWEEN_SAVES = 20.0
_TINY = 1e-30


@dataclass(frozen=True)
class Attempt:
    """One execution of a block under training.

    Attributes:
        run: Executes it, given a transformation of its values or None; returns its outputs by name.
        wanted: The original's outputs, floating-point ones only.
        weights: What each element's error counts, broadcastable to the output; 1 where it has none.
        valid: Which elements count, broadcastable to the output; all where it has none.

    """

    run: Callable[[Transform | None], Mapping[str, torch.Tensor]]
    wanted: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    valid: Mapping[str, torch.Tensor]

    def zeros(self, transform: Transform | None = None) -> dict[str, torch.Tensor]:
        """Return zeros in place of all outputs."""
        return {name: torch.zeros_like(value) for name, value in self.wanted.items()}

    def error(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted mean squared error over all outputs."""
        total = next(iter(self.wanted.values())).new_zeros(())
        for name, wanted in self.wanted.items():
            squared = (found[name] - wanted).square()
            if name in self.weights:
                squared = squared * self.weights[name]
            if name in self.valid:
                squared = squared[self.valid[name].expand_as(squared)]
            total = total + squared.mean()
        return total


Objective = Callable[[Attempt], torch.Tensor]


def squared_error(attempt: Attempt) -> torch.Tensor:
    """The weighted mean squared error of the block's outputs."""
    return attempt.error(attempt.run(None))


@dataclass(frozen=True)
class Job:
    """What the trainings of all blocks share.

    Attributes:
        original: The program to match.
        changed: The program that is trained.
        batches: Named inputs.
        wanted: Values between blocks of the original.
        found: Values between blocks of the changed program, behind the blocks that are trained already.
        weights: What an element's error counts, by the name of an output of a block.
        objective: The loss of an attempt.
        settings: How to train.
        state: Where training under way is kept.

    """

    original: Program
    changed: Program
    batches: Sequence[Mapping[str, torch.Tensor]]
    wanted: Store
    found: Store
    weights: Mapping[str, torch.Tensor]
    objective: Objective
    settings: Settings
    state: State

    def given(self, store: Store, block: Block, batch: int) -> dict[str, Any]:
        """Return the values of a block's inputs."""
        return {name: store.get(batch, name) for name in block.inputs}


@dataclass(frozen=True)
class Place:
    """A block in the original and in the changed program, and its number."""

    index: int
    original: Block
    changed: Block


@dataclass(frozen=True)
class _Best:
    """The best results so far, and their error."""

    results: dict[str, torch.Tensor]
    error: float


class Training:
    """The training of one block.

    Args:
        job: What all blocks share.
        place: Which block.
        made: The variables to train, by parameter name.
        settled: Parameters that were trained already.

    """

    def __init__(
        self, job: Job, place: Place, made: Mapping[str, Variable], settled: Mapping[str, torch.Tensor]
    ) -> None:
        self.job, self.place, self.made, self.settled = job, place, made, settled
        self.partial = f"block-{place.index}-partial"
        nodes = {node.name: node for node in job.original.graph.nodes}
        self.outputs = {name: nodes[name] for name in place.original.outputs if _is_float(nodes[name])}
        held_out = job.settings.judged(len(job.batches))
        self.seen = [batch for batch in range(len(job.batches)) if batch not in held_out]
        self.judged = held_out or tuple(self.seen)
        self.penalized = max(sum(v.leaf.numel() for v in made.values() if v.penalty(1.0) is not None), 1)

    def run(
        self, seconds: float | None, progress: Callable[[int], None]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Train within a time (None: no limit); return the results by parameter name, and the facts of the training."""
        started = time.monotonic()
        untrained = {name: variable.untrained() for name, variable in self.made.items()}
        before, zeros = self._error_of(untrained)
        judging = time.monotonic() - started
        self.best = _Best(untrained, before)
        saved = self.job.state.read(self.partial)
        if saved is not None:
            steps, self.judgements = int(saved[1]["iterations"]), int(saved[1]["judgements"])
        else:
            self.judgements = self.job.settings.judgements(seconds, judging)
            steps = self._affordable(seconds, before, judging)
        groups = [{"params": [variable.leaf], "lr": variable.rate(steps)} for variable in self.made.values()]
        adam = torch.optim.AdamW(groups, weight_decay=self.job.settings.decay)
        done = 0 if saved is None else self._restore(adam, *saved)
        # what an interrupted run has used is gone
        started -= 0.0 if saved is None else float(saved[1]["seconds"])
        written = time.monotonic()
        while done < steps and (done < _FEWEST_STEPS or not _is_over(started, seconds)):
            progress(100 * done // steps)
            self._step(adam, done, steps, before)
            done += 1
            if self._is_judged_after(done, steps):
                self._judge()
            if time.monotonic() - written > _SECONDS_BETWEEN_SAVES:
                self._save(adam, done, steps, time.monotonic() - started)
                written = time.monotonic()
        if done < steps:
            self._judge()
        facts = {
            "name": self.place.original.name,
            "before": before / zeros,
            "after": self.best.error / zeros,
            "iterations": done,
        }
        return self.best.results, facts

    def _step(self, adam: torch.optim.AdamW, step: int, steps: int, before: float) -> None:
        settings = self.job.settings
        share = settings.rate(step, steps)
        for group, variable in zip(adam.param_groups, self.made.values(), strict=True):
            group["lr"] = share * variable.rate(steps)
        adam.zero_grad()
        self._loss(step, steps, before).backward()
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_([variable.leaf for variable in self.made.values()], settings.clip)
        adam.step()

    def _is_judged_after(self, done: int, steps: int) -> bool:
        return done * self.judgements // steps > (done - 1) * self.judgements // steps

    def _judge(self) -> None:
        """Keep what has been trained so far if it is the best yet."""
        results = {name: variable.result() for name, variable in self.made.items()}
        error, _ = self._error_of(results)
        if error < self.best.error:
            self.best = _Best(results, error)

    def _error_of(self, results: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Return the mean objective over the batches to judge by with settled values, and that of zeros."""
        values = {name: self.made[name].settled(result) for name, result in results.items()}
        total = zeros = 0.0
        with torch.no_grad():
            for batch in self.judged:
                attempt = self._attempt(batch, values, None)
                total += float(self.job.objective(attempt))
                zeros += float(self.job.objective(replace(attempt, run=attempt.zeros)))
        count = len(self.judged)
        return total / count, max(zeros / count, _TINY)

    def _affordable(self, seconds: float | None, before: float, judging: float) -> int:
        """Return how many steps fit into the time, beside judging, which takes so many seconds each time."""
        most = self.job.settings.iterations
        if seconds is None:
            return most
        took = []
        # the first is slower than others; batches differ in length
        for step in range(_TIMED_STEPS):
            started = time.monotonic()
            self._loss(step, most, before).backward()
            took.append(time.monotonic() - started)
        for variable in self.made.values():
            variable.leaf.grad = None
        left = seconds - judging * (self.judgements + 1)
        typical = sum(took[1:]) / len(took[1:])
        return max(min(most, int(left / max(typical, 1e-9))), min(most, _FEWEST_STEPS))

    def _loss(self, step: int, steps: int, before: float) -> torch.Tensor:
        # each step's chances follow from its number alone, so that training can go on anywhere
        generator = torch.Generator().manual_seed(hash((self.job.settings.seed, self.place.index, step)) % 2**63)
        batch = self.seen[int(torch.randint(len(self.seen), (), generator=generator))]
        values = {name: variable.value() for name, variable in self.made.items()}
        loss = self.job.objective(self._attempt(batch, values, generator)) / max(before, _TINY)
        progress = (step / steps - _WARMUP) / (1 - _WARMUP)
        if progress > 0:
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - progress)
            for variable in self.made.values():
                if (penalty := variable.penalty(beta)) is not None:
                    loss = loss + _LAMBDA * penalty / self.penalized
        return loss

    def _attempt(self, batch: int, values: Mapping[str, torch.Tensor], chances: torch.Generator | None) -> Attempt:
        job, drop = self.job, self.job.settings.drop
        given = job.given(job.found, self.place.changed, batch)
        if chances is not None and drop:
            given = dict(self._mixed(given, batch, chances, drop))
        parameters = {**self.settled, **values}

        def run(transform: Transform | None) -> dict[str, torch.Tensor]:
            steps = [s for s in (_dropping(chances, drop) if chances is not None and drop else None, transform) if s]
            return run_block(job.changed, self.place.changed, given, parameters, transform=_in_turn(steps))

        inputs = job.batches[batch]
        valid = {name: valid_positions(job.original, value_of(node), inputs) for name, node in self.outputs.items()}
        return Attempt(
            run,
            {name: job.wanted.get(batch, name) for name in self.outputs},
            {name: job.weights[name] for name in self.outputs if name in job.weights},
            {name: mask for name, mask in valid.items() if mask is not None},
        )

    def _mixed(
        self, given: Mapping[str, Any], batch: int, chances: torch.Generator, drop: float
    ) -> Iterator[tuple[str, Any]]:
        """Yield the block's inputs with some elements as they are in the original."""
        known = set(self.place.original.inputs)
        for name, value in given.items():
            if name in known and isinstance(value, torch.Tensor) and value.is_floating_point():
                kept = torch.rand(value.shape, generator=chances) < drop
                yield name, torch.where(kept, self.job.wanted.get(batch, name), value)
            else:
                yield name, value

    def _save(self, adam: torch.optim.AdamW, step: int, steps: int, seconds: float) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, variable in self.made.items():
            moments = adam.state[variable.leaf]
            tensors |= {f"{name}/leaf": variable.leaf, f"{name}/mean": moments["exp_avg"]}
            tensors |= {f"{name}/square": moments["exp_avg_sq"], f"{name}/step": moments["step"]}
            tensors[f"{name}/best"] = self.best.results[name]
        facts = {"step": step, "iterations": steps, "judgements": self.judgements, "seconds": seconds}
        facts["error"] = self.best.error
        self.job.state.write(self.partial, tensors, facts)

    def _restore(self, adam: torch.optim.AdamW, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> int:
        with torch.no_grad():
            for name, variable in self.made.items():
                variable.leaf.copy_(tensors[f"{name}/leaf"])
                adam.state[variable.leaf] = {
                    "step": tensors[f"{name}/step"].clone(),
                    "exp_avg": tensors[f"{name}/mean"].clone(),
                    "exp_avg_sq": tensors[f"{name}/square"].clone(),
                }
        self.best = _Best({name: tensors[f"{name}/best"] for name in self.made}, float(facts["error"]))
        return int(facts["step"])


def _is_over(started: float, seconds: float | None) -> bool:
    return seconds is not None and time.monotonic() - started > seconds


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _dropping(chances: torch.Generator, drop: float) -> Transform:
    """Leave elements of simulated quantizers unquantized at random."""

    def transform(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        if not is_call(node, xf.fake_quantize):
            return value
        kept = torch.rand(value.shape, generator=chances) < drop
        return torch.where(kept, values[node.all_input_nodes[0]], value)

    return transform


def _in_turn(steps: Sequence[Transform]) -> Transform | None:
    if not steps:
        return None

    def transform(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        for step in steps:
            value = step(node, value, values)
        return value

    return transform
