"""Training chosen parameters of a program, block by block, so that each block's output is that of the original.

    min  mean(H (B(x') - B_original(x))^2) + lambda mean(1 - |2h - 1|^beta)

x are the values that reach the block in the original, x' those that reach it behind the blocks that are trained
already (Nagel et al., AdaRound, arXiv 2004.10568, section 3.2; Li et al., BRECQ, arXiv 2102.05426).  With ``drop``,
elements of quantized values, and of x' itself, are at random replaced by the unquantized ones (Wei et al., QDrop, arXiv
2203.05740).

The published loss is summed over channels and the penalty over weights, with a lambda that suits one network.  Here
both are relative: the loss to that of the block before training, the penalty to the number of its weights.  A step sees
one calibration batch.  A block that training made no better on the calibration data stays as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from xformopt.errors import DataError
from xformopt.program import Program
from xformopt.reconstruction.blocks import Block, cut_blocks, cut_like
from xformopt.reconstruction.settings import Settings
from xformopt.reconstruction.state import State, key_of
from xformopt.reconstruction.training import Job, Objective, Place, Training, squared_error
from xformopt.reconstruction.values import Store, run_block
from xformopt.reconstruction.variables import Variable

__all__ = ["Make", "Reconstruction", "Trained", "reconstruct"]

Make = Callable[[], Variable]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trained:
    """What became of one block: its error over that of zeros, before training and after, and the steps it took."""

    name: str
    before: float
    after: float
    iterations: int


@dataclass(frozen=True)
class Reconstruction:
    """What :func:`reconstruct` found: the result of every variable by parameter name, and what became of each block."""

    results: Mapping[str, torch.Tensor]
    blocks: tuple[Trained, ...]

    def summary(self) -> str:
        """Return one line for a pass's notes."""
        before, after = (math.fsum(getattr(block, when) for block in self.blocks) for when in ("before", "after"))
        steps = max((block.iterations for block in self.blocks), default=0)
        count = max(len(self.blocks), 1)
        return (
            f"{len(self.blocks)} blocks reconstructed in up to {steps} steps each: mean squared error of their outputs "
            f"over that of zeros {before / count:.2e} before, {after / count:.2e} after (mean of blocks)"
        )


def reconstruct(
    original: Program,
    changed: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    variables: Mapping[str, Make],
    settings: Settings,
    *,
    describes: Sequence[object] = (),
    blocks: Sequence[Block] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    objective: Objective = squared_error,
    progress: Progress = lambda what, done, total: None,
) -> Reconstruction:
    """Train parameters of ``changed`` so that its blocks do what those of ``original`` do.

    Finished blocks are kept in the cache folder, and the one under way every few seconds: called again with the same
    arguments, it goes on where it was interrupted, to the same result.

    Args:
        original: The program to match.
        changed: Computes the same values at the ends of blocks, under the same names.
        batches: Named inputs.
        variables: What makes the variable of a parameter of ``changed``, by the parameter's name.
        settings: How to train.
        describes: What the results depend on beside the programs and settings, such as a pass and its options.
        blocks: Where to cut; by default at the residual stream.
        weights: What an element's error counts, by the name of an output of a block.
        objective: The loss of an attempt.
        progress: Called with (what, done, total).

    Raises:
        DataError: there are no batches, none to train on, or a value is not a number.

    """
    if not batches:
        raise DataError(
            "Parameters are trained block by block on calibration data, and there is none. Give some with "
            "--calibration (or calibration=... in Python)."
        )
    if len(batches) <= settings.held_out:
        raise DataError(
            f"Of {len(batches)} batches of calibration data, {settings.held_out} would be held out to judge by, and "
            f"none is left to train on. Give more data."
        )
    cuts = tuple(blocks) if blocks is not None else cut_blocks(original)
    # the budget decides how many steps are made, and with it the result
    parts = (original.fingerprint, changed.fingerprint, asdict(settings), sorted(variables), cuts, *describes)
    state = State(key_of(parts, [*batches, *([weights] if weights else [])]))
    with Store(settings.memory // 2) as wanted, Store(settings.memory // 2) as found:
        job = Job(
            original,
            changed,
            batches,
            wanted,
            found,
            weights or {},
            objective,
            settings,
            state,
        )
        return _Loop(job, cuts, variables, settings.minutes).run(progress)


@dataclass
class _Loop:
    job: Job
    cuts: Sequence[Block]
    variables: Mapping[str, Make]
    minutes: float | None
    results: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)

    def run(self, progress: Progress) -> Reconstruction:
        job = self.job
        pairs = zip(self.cuts, cut_like(job.changed, self.cuts), strict=True)
        places = [Place(index, *pair) for index, pair in enumerate(pairs)]
        chosen = _assign(job.changed, [place.changed for place in places], self.variables)
        sizes = [sum(job.changed.parameters[name].numel() for name in names) for names in chosen]
        stop = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        settled: dict[str, torch.Tensor] = {}
        self._put_inputs()
        for index, place in enumerate(places):
            what = f"reconstructing {place.original.name}"
            self._pass_on(job.original, place.original, job.wanted, {})
            if chosen[index]:
                made = {name: self.variables[name]() for name in chosen[index]}
                left = None if stop is None else (stop - time.monotonic()) * sizes[index] / sum(sizes[index:])
                report = partial(_report, progress, what, index, len(places))
                self._finish(Training(job, place, made, settled), left, report)
                settled |= {name: made[name].settled(self.results[name]) for name in made}
            self._pass_on(job.changed, place.changed, job.found, settled)
            self._forget(places[index + 1 :])
        progress("reconstructed", len(places) * 100, len(places) * 100)
        return Reconstruction(self.results, tuple(self.trained))

    def _finish(self, training: Training, seconds: float | None, progress: Callable[[int], None]) -> None:
        """Take a block's results from an earlier run, or train it."""
        name, state = f"block-{training.place.index}", self.job.state
        if (known := state.read(name)) is not None and set(known[0]) == set(training.made):
            results, facts = known
        else:
            results, facts = training.run(seconds, progress)
            state.write(name, results, facts)
            state.forget(training.partial)
        self.results.update(results)
        self.trained.append(Trained(**facts))

    def _put_inputs(self) -> None:
        for index, batch in enumerate(self.job.batches):
            for name, value in batch.items():
                self.job.wanted.put(index, name, value)
                self.job.found.put(index, name, value)

    def _pass_on(self, program: Program, block: Block, store: Store, settled: Mapping[str, torch.Tensor]) -> None:
        """Compute a block's outputs on every batch."""
        for index in range(len(self.job.batches)):
            with torch.no_grad():
                outputs = run_block(program, block, self.job.given(store, block, index), settled)
            for name, value in outputs.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                    raise DataError(
                        f"On the calibration data, the block {block.name} computes values that are not numbers. Look "
                        f"for the cause in the data or the model."
                    )
                store.put(index, name, value)

    def _forget(self, later: Sequence[Place]) -> None:
        """Drop what no later block reads."""
        for store, blocks in (
            (self.job.wanted, [place.original for place in later]),
            (self.job.found, [place.changed for place in later]),
        ):
            needed = {name for block in blocks for name in block.inputs}
            for name in set(store.names()) - needed:
                store.drop(name)


def _report(progress: Progress, what: str, index: int, count: int, percent: int) -> None:
    progress(what, index * 100 + percent, count * 100)


def _assign(program: Program, blocks: Sequence[Block], variables: Mapping[str, Make]) -> list[list[str]]:
    """Return the parameters to train of each block; one that several read is trained in the first."""
    places = {name: index for index, block in enumerate(blocks) for name in block.nodes}
    chosen: list[list[str]] = [[] for _ in blocks]
    for node in program.graph.find_nodes(op="get_attr"):
        if str(node.target) in variables:
            readers = [places[user.name] for user in node.users if user.name in places]
            if readers:
                chosen[min(readers)].append(str(node.target))
    return chosen
