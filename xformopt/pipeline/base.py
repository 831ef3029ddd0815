"""What a pass is: a frozen dataclass whose fields are its options in Python, on the command line and in recipes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch

from xformopt.program import Level, Program
from xformopt.rewrite import Fired, Rejected, Rule, rewrite, rule_name

__all__ = ["Context", "Effect", "Pass", "PassResult", "RewritePass", "pass_name"]

# exact: the same function up to rounding; approximate: calibration data at most; tuned: needs gradient steps
Effect: TypeAlias = Literal["exact", "approximate", "tuned"]


@dataclass(frozen=True)
class Context:
    """What the outside gives to a pass.

    Attributes:
        calibration: Batches of named input tensors, as the program takes them; may be empty.
        target: Name of the target the program is meant for.
        seed: Seed of everything random.
        assume: Facts the user vouches for, such as ``no-padding``.
        progress: Called with (what, done, total).
        time: Returns the milliseconds that programs take on the target, each by its name; None where nobody measures.
        measure: Returns the interval of the speed-up of the second program over the first, on the target; None where
            nothing can be timed.
        score: Returns what a program reaches on validation items of the user's task, higher is better; None where
            there is no such task.
        original: The program that lossy passes are to stay close to, lifted; None where nobody knows it.
    """

    calibration: Sequence[dict[str, torch.Tensor]] = ()
    target: str = "ort-cpu"
    seed: int = 0
    assume: frozenset[str] = frozenset()
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    time: Callable[[Mapping[str, Program]], Mapping[str, float]] | None = None
    measure: Callable[[Program, Program], tuple[float, float]] | None = None
    score: Callable[[Program], float] | None = None
    original: Program | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the new program, where it fired, where it could not and why."""

    program: Program
    changed: bool
    fired: tuple[Fired, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of Programs.  Subclasses are frozen dataclasses; their fields are the options.

    A pass that is right only under a fact about the inputs lists it in ``assumptions``, and refuses unless it is
    stated.  A lossy pass that does not aim at time is not asked for any.  One that ``recovers`` brings the program back
    towards the original: the passes before it may go over the budget of drift, which is judged behind it.  One that
    looks at layers one by one belongs ``before_fusion``: appended to a recipe, it runs ahead of the passes that fuse
    them.
    """

    effect: ClassVar[Effect] = "exact"
    aims_at_time: ClassVar[bool] = True
    recovers: ClassVar[bool] = False
    before_fusion: ClassVar[bool] = False
    takes: ClassVar[Level] = Level.LIFTED
    leaves: ClassVar[Level] = Level.LIFTED
    sources: ClassVar[tuple[str, ...]] = ()
    assumptions: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The name on the command line: ``FuseQkv`` is ``fuse-qkv``."""
        return pass_name(type(self))

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Return the transformed program; ``program`` itself is left as it is."""


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that is a set of rewrite rules, applied until none fires."""

    @abstractmethod
    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the rules; each value meets them in this order."""

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply the rules everywhere."""
        done = rewrite(program, {rule_name(rule): rule for rule in self.rules(program, context)})
        changed = bool(done.fired)
        level = max(program.level, self.leaves, key=list(Level).index) if changed else program.level
        result = done.program if changed else program
        result.level = level
        return PassResult(result, changed, done.fired, done.rejected)


def pass_name(kind: type[Pass]) -> str:
    """Return the command-line name of a pass class."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind.__name__).lower()
