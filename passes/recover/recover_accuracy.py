"""Train a program so that it answers as the original does: distillation on calibration data, without labels.

    min  sum_o D(o(x), o'(x)) + hidden mean_l ||h_l(x) - h'_l(x)||^2 / ||h_l(x)||^2

o are the outputs, h_l the sums on the residual stream that original and program both compute in the same shape.  D is
``T^2 KL(softmax(o / T) || softmax(o' / T))`` of logits (Hinton et al., arXiv 1503.02531), the mean over positions; and
``||o - o'||^2 / ||o||^2`` of other outputs.  Hidden values as targets: Romero et al., FitNets, arXiv 1412.6550; of a
transformer's layers: Sun et al., arXiv 1908.09355.  With ``objective=blocks``, the stretches between those sums are
trained one after the other, each on what reaches it, by the squared error of its own output.

AdamW with a rate that rises over 5% of the steps and falls as half a cosine (Loshchilov and Hutter, arXiv 1711.05101
and 1608.03983).  Some batches are held out: the values that do best on them are kept, and where none does better than
what was there, the program stays as it is.  Interrupted, it goes on where it was, in the cache folder.

**Tuned**: takes gradient steps on calibration data.  Run it behind the passes whose loss is to be recovered.  What is
rounded as it runs (``quantize-ternary`` with ``trainable``, simulated activations) trains straight through the rounding
(Bengio et al., arXiv 1308.3432); weights that are stored in integers stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch

from xformopt.errors import DataError, PassError
from xformopt.passes.recover.support.distillation import Distillation, agreement, distance
from xformopt.passes.recover.support.trainable import Part, is_chosen, parts_of
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program
from xformopt.reconstruction import (
    Aligned,
    Free,
    LowRank,
    Make,
    Positive,
    Reconstruction,
    Settings,
    align,
    reconstruct,
    squared_error,
    stopped_gradients,
)
from xformopt.rewrite import Rejected

__all__ = ["RecoverAccuracy"]

_WARM_UP, _CLIP = 0.05, 1.0
_TRAINED = {
    "all": tuple(Part),
    "linears": (Part.WEIGHT,),
    "lora": (Part.WEIGHT,),
    "norms": (Part.NORM,),
    "biases": (Part.BIAS,),
}
# of the rate: scales train in proportion to what they are; where little is trained, it may go far
_SCALE_PACE, _FEW_PACE = 4.0, 4.0
# the relative distance below which two programs answer alike, but for rounding
_ALIKE = 1e-10
_FEW_ROWS = 512


@dataclass(frozen=True)
class RecoverAccuracy(Pass):
    """Train what other passes have changed, until it answers as the original does (distillation, without labels).

    Attributes:
        minutes: What training may take; steps are reduced to what fits.  None: no limit.
        objective: answers trains the whole program towards the original's outputs and residual stream; blocks trains
            the stretches between the sums on the residual stream one by one.
        train: all parameters; the weights of linear layers; lora, updates of low rank to those weights, which are
            folded in; the weights and biases of norms; or all biases.
        only: Shell patterns of parameter names or module paths; what fits none stays as it is.
        rank: Of the updates of lora.
        learning_rate: At its highest; four times as much for lora, norms, biases and scales of quantizers.
        temperature: At which logits are compared.
        hidden: What the residual stream counts beside the outputs.
        decay: Weight decay, of AdamW.
        held_out: The share of the batches that are not trained on, but decide what is kept.
        iterations: Training steps at most, with objective=blocks of each block.

    """

    minutes: float | None = 5.0
    objective: Literal["answers", "blocks"] = "answers"
    train: Literal["all", "linears", "lora", "norms", "biases"] = "all"
    only: tuple[str, ...] = ("*",)
    rank: int = 8
    learning_rate: float = 5e-4
    temperature: float = 2.0
    hidden: float = 1.0
    decay: float = 0.0
    held_out: float = 0.2
    iterations: int = 5000

    effect: ClassVar[Effect] = "tuned"
    before_fusion: ClassVar[bool] = True
    aims_at_time: ClassVar[bool] = False
    recovers: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
        "Romero et al., FitNets, arXiv 1412.6550 (hidden values)",
        "Hu et al., LoRA, arXiv 2106.09685 (train=lora)",
        "Loshchilov and Hutter, AdamW, arXiv 1711.05101",
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but is {self.rank}")
        if not self.learning_rate > 0 or not self.temperature > 0 or self.hidden < 0:
            raise ValueError("learning_rate and temperature must be positive, and hidden must not be negative")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, but is {self.held_out}")
        self._settings(batches=2, seed=0)

    def run(self, program: Program, context: Context) -> PassResult:
        """Train; the program stays as it is where that does not help."""
        original = _original(context)
        _check_data(context.calibration, 1)
        if all(distance(original, program, [batch]) < _ALIKE for batch in context.calibration):
            return _unchanged(program, "it answers as the original does")
        _check_data(context.calibration, 2)
        settings = self._settings(len(context.calibration), context.seed)
        variables, refused = self._variables(program, context)
        aligned = align(original, program)
        found = self._reconstruct(aligned, variables, settings, context)
        judged = [context.calibration[index] for index in settings.judged(len(context.calibration))]
        notes = (*_notes(program, variables, context), self._outcome(found))
        if all(block.after >= block.before for block in found.blocks):
            return replace(_unchanged(program, "training made it no better on what is held out", refused), notes=notes)
        trained = program.copy()
        trained.parameters |= found.results
        agreements = [agreement(original, which, judged) for which in (program, trained)]
        agreed = "agreement with the original on what is held out: {:.1%} before, {:.1%} after".format(*agreements)
        return PassResult(trained, True, (), refused, (*notes, agreed))

    def _settings(self, batches: int, seed: int) -> Settings:
        return Settings(
            iterations=self.iterations,
            minutes=self.minutes,
            seed=seed,
            warm_up=_WARM_UP,
            cosine=True,
            decay=self.decay,
            clip=_CLIP,
            held_out=max(round(self.held_out * batches), 1),
        )

    def _variables(self, program: Program, context: Context) -> tuple[dict[str, Make], tuple[Rejected, ...]]:
        """Return what makes the variable of each parameter to train, and why others are not trained."""
        parts, reasons = parts_of(program)
        chosen = is_chosen(program, self.only)
        wanted = [name for name, part in parts.items() if part in _TRAINED[self.train] and chosen[name]]
        if not wanted:
            raise PassError(
                f"Nothing is left to train in {program.name!r}: of its parameters in floating point, none is among "
                f"{', '.join(_TRAINED[self.train])} and fits only={list(self.only)}. Train other parameters, or run "
                f"recover-accuracy before the pass that stores weights in integers."
            )
        stopped = stopped_gradients(program, context.calibration[0], wanted)
        if len(stopped) == len(wanted):
            raise PassError(
                f"Nothing can be trained in {program.name!r}: no gradient reaches the parameters, as they are read "
                f"behind {', '.join(sorted(set(stopped.values())))}. Run recover-accuracy before the pass that put it "
                f"there."
            )
        reasons |= {name: f"{by or 'nothing that is returned'} gives it no gradient" for name, by in stopped.items()}
        made = {name: self._variable(name, program.parameters[name], parts[name]) for name in wanted}
        made = {name: make for name, make in made.items() if name not in stopped}
        return made, tuple(Rejected(self.name, name, name, reason) for name, reason in reasons.items() if chosen[name])

    def _variable(self, name: str, value: torch.Tensor, part: Part) -> Make:
        few = self.learning_rate * _FEW_PACE
        if part is Part.SCALE:
            return partial(Positive, value, rate=few)
        if self.train == "lora":
            return partial(LowRank, value, rank=min(self.rank, *value.shape), rate=few)
        return partial(Free, value, rate=few if self.train in ("norms", "biases") else self.learning_rate)

    def _reconstruct(
        self, aligned: Aligned, variables: Mapping[str, Make], settings: Settings, context: Context
    ) -> Reconstruction:
        logits = tuple(value for output, value in aligned.outputs if "logits" in output)
        others = tuple(value for output, value in aligned.outputs if "logits" not in output)
        residual = tuple(value for _, value in aligned.residual)
        whole = self.objective == "answers"
        if not whole and not residual:
            raise PassError(
                f"The original and {aligned.changed.name!r} have no sum on the residual stream in common, so that "
                f"there are no blocks to train one by one. Take objective=answers."
            )
        loss = Distillation(logits, others, residual, self.temperature, self.hidden)
        return reconstruct(
            aligned.original,
            aligned.changed,
            context.calibration,
            variables,
            settings,
            describes=(self.name, asdict(self)),
            blocks=(aligned.whole("answers"),) if whole else aligned.blocks(),
            objective=loss if whole else squared_error,
            progress=context.progress,
        )

    def _outcome(self, found: Reconstruction) -> str:
        if self.objective == "blocks":
            return found.summary()
        (whole,) = found.blocks
        return (
            f"trained in {whole.iterations} steps: loss on what is held out over that of zeros {whole.before:.2e} "
            f"before, {whole.after:.2e} after"
        )


def _original(context: Context) -> Program:
    if context.original is None:
        raise PassError(
            "There is no original to learn from: recover-accuracy runs in a pipeline, behind the passes whose loss it "
            "recovers."
        )
    return context.original


def _check_data(batches: Sequence[object], fewest: int) -> None:
    if len(batches) < fewest:
        raise DataError(
            f"A program is trained on calibration data and judged on a part of it that is held out, which takes two "
            f"batches at least, and there are {len(batches)}. Give more with --calibration or --task (or "
            f"calibration=... in Python)."
        )


def _unchanged(program: Program, reason: str, refused: tuple[Rejected, ...] = ()) -> PassResult:
    return PassResult(program, False, (), (*refused, Rejected("recover-accuracy", "", program.name, reason)))


def _notes(program: Program, variables: Mapping[str, Make], context: Context) -> tuple[str, ...]:
    """Return what was trained, what was not, and whether the data was much."""
    trained = sum(program.parameters[name].numel() for name in variables)
    stored = sum(not value.is_floating_point() for value in program.parameters.values())
    rows = sum(len(next(iter(batch.values()))) for batch in context.calibration)
    found = [f"{len(variables)} parameters trained ({trained:,} numbers) on {rows} rows of calibration data"]
    if stored:
        found.append(f"{stored} parameters in integers stay as they are")
    if rows < _FEW_ROWS:
        found.append(f"{rows} rows are few to train on: more of them would recover more")
    return tuple(found)
