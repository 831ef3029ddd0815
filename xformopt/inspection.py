"""Looking before leaping: a model at the lifted level with its cost, and what an optimization would run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from xformopt.analysis.cost import Cost, cost
from xformopt.comparison import check_target
from xformopt.original import Model, capture_original, chosen_sizes
from xformopt.pipeline import Context, Lift, Pass
from xformopt.pipeline.index import format_pass, parse_pass
from xformopt.pipeline.recipes import load_recipe
from xformopt.program import Level, Program

__all__ = ["Inspection", "Plan", "inspect", "passes_of", "plan"]


@dataclass(frozen=True)
class Inspection:
    """A lifted Program and what it costs at given sizes."""

    program: Program
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of ``inspect --cost --json``."""
        counted = self.cost
        return {
            "name": self.program.name,
            "level": str(self.program.level),
            "sizes": counted.sizes,
            "parameters": counted.parameters,
            "parameter_bytes": counted.parameter_bytes,
            "flops": counted.flops,
            "bytes": counted.bytes,
            "nodes": counted.nodes,
            "operators": counted.operators,
        }


@dataclass(frozen=True)
class Plan:
    """What ``optimize`` would do: the passes as the command line writes them, and the cost before."""

    passes: tuple[str, ...]
    target: str
    inspection: Inspection

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of ``optimize --dry-run --json``."""
        return {"target": self.target, "passes": list(self.passes), "cost": self.inspection.to_dict()}


def inspect(
    model: Model, *, batch: int | None = None, length: int | None = None, trust_remote_code: bool = False
) -> Inspection:
    """Return a model at the lifted level, and its cost at the example's sizes or the given ones.

    Raises:
        XformoptError: the model cannot be captured, or a size does not fit it.

    """
    original = capture_original(model, trust_remote_code=trust_remote_code, length=length)
    program = original.program
    sizes = chosen_sizes(program, batch, length)
    if program.level == Level.CAPTURED:
        program = Lift().run(program, Context()).program
    return Inspection(program, cost(program, sizes))


def plan(
    model: Model,
    *,
    target: str = "ort-cpu",
    recipe: str | Path | None = "exact",
    passes: Iterable[str | Pass] = (),
    batch: int | None = None,
    length: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Say what ``optimize`` would do with these arguments; nothing is run but capture and lifting.

    Raises:
        XformoptError: what ``optimize`` would raise before its first pass.

    """
    check_target(target, baseline=False)
    steps = passes_of(recipe, passes)
    found = inspect(model, batch=batch, length=length, trust_remote_code=trust_remote_code)
    return Plan(tuple(format_pass(step) for step in steps), target, found)


def passes_of(recipe: str | Path | None, passes: Iterable[str | Pass] = ()) -> tuple[Pass, ...]:
    """Return the passes of a recipe (None: of none) with further ones appended.

    Further ones that belong before fusion, up to the first that does not, run ahead of the recipe's passes that fuse.

    Raises:
        UsageError: a recipe, a pass or an option does not exist.

    """
    further = [parse_pass(item) if isinstance(item, str) else item for item in passes]
    known = load_recipe(recipe) if recipe is not None else ()
    lifted = tuple(takewhile(lambda step: step.leaves != Level.TARGET, known))
    early = tuple(takewhile(lambda step: step.before_fusion, further))
    return (*lifted, *early, *known[len(lifted) :], *further[len(early) :])
