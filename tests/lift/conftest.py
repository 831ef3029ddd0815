"""Capture a module, lift it, and look at what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from xformopt.capture.exporter import capture_module
from xformopt.lift import lifting_rules
from xformopt.program import Program
from xformopt.program.text import target_name
from xformopt.rewrite import Rejected, rewrite


@dataclass(frozen=True)
class Lifted:
    """A captured Program and the lifted one."""

    captured: Program
    program: Program
    rejected: tuple[Rejected, ...]

    @property
    def operators(self) -> Counter[str]:
        """Operators of the lifted Program by printed name."""
        return Counter(target_name(node.target) for node in self.program.nodes())

    def nodes(self, operator: str) -> list[fx.Node]:
        """All uses of an operator in execution order."""
        return [node for node in self.program.nodes() if target_name(node.target) == operator]

    def attributes(self, operator: str, position: int = 0) -> Mapping[str, Any]:
        """The attributes of one use of an operator, defaults included."""
        node = self.nodes(operator)[position]
        defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.kwarg_only}  # type: ignore[union-attr]
        return {**defaults, **node.kwargs}

    def operand(self, operator: str, name: str, position: int = 0) -> fx.Node | None:
        """One tensor operand of one use of an operator, None if it is left out."""
        node = self.nodes(operator)[position]
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        return dict(zip(names, node.args, strict=False)).get(name)  # type: ignore[return-value]

    @property
    def reasons(self) -> str:
        """Every reason for refusing."""
        return "; ".join(rejected.reason for rejected in self.rejected)

    def check(self, inputs: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> None:
        """Assert that both Programs compute the same on valid positions."""
        before, after = self.captured.run(inputs), self.program.run(inputs)
        for spec in self.captured.outputs:
            old, new = before[spec.name], after[spec.name]
            keep = valid(spec, inputs, old)
            assert distance(new[keep], old[keep]) <= tolerance, spec.name


def valid(spec: Any, inputs: Mapping[str, torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """Return which positions of an output are not padding."""
    mask = inputs[spec.mask] if spec.mask else None
    if mask is None or mask.shape != value.shape[:2]:
        return torch.ones(value.shape[:1], dtype=torch.bool)
    return mask == 0 if spec.mask_means == "padding" else mask != 0


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance; infinite where shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - theirs).double().norm() / theirs.double().norm().clamp(min=1e-30))


Lift = Callable[..., Lifted]


@pytest.fixture
def lift() -> Lift:
    """Capture a module on example inputs (every batch and second axis varies unless told otherwise) and lift it."""

    def run(model: torch.nn.Module, dynamic: Any = "all", **inputs: torch.Tensor) -> Lifted:
        if dynamic == "all":
            lengths: dict[int, str] = {}
            dynamic = {
                name: {0: "batch", 1: lengths.setdefault(value.shape[1], f"length_{len(lengths)}")}
                for name, value in inputs.items()
            }
        captured = capture_module(model, inputs, dynamic)
        done = rewrite(captured, lifting_rules(captured))
        lifted = Lifted(captured, done.program, done.rejected)
        lifted.check(inputs)
        return lifted

    return run


@pytest.fixture(name="distance")
def _distance() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return distance


@pytest.fixture(name="valid")
def _valid() -> Callable[..., torch.Tensor]:
    return valid
