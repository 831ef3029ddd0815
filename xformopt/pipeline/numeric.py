"""Does a pass still compute the same?  Rewrites are judged where they happened, programs end to end.

End to end alone cannot judge an exact pass: rounding differences grow through a deep or quantized network.  So every
rewritten region is run in its old and its new form on the values that really reach it, at several shapes and paddings.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.analysis import cost
from xformopt.errors import XformoptError
from xformopt.program import Program, example_sizes, interpret, sample_inputs, valid_positions
from xformopt.program.interpret import call
from xformopt.program.sample import Padding, is_mask
from xformopt.rewrite import Fired, Region

__all__ = ["Case", "Deviation", "edge_cases", "relative_l2", "run_region", "verify_regions"]

# relative L2 between the old and the new form of an exact rewrite, by the precision it runs in
EXACT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
_LONGEST = 2048
# every pass runs every case a few times: one run should take seconds, not minutes
_CASE_FLOPS = 150e9


@dataclass(frozen=True)
class Case:
    """One set of inputs on which programs are compared, and what the captured program returns for them."""

    name: str
    inputs: dict[str, torch.Tensor]
    captured: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Deviation:
    """A rewrite whose two forms disagree: by how much, on which case, with the values that show it."""

    fired: Fired
    case: str
    relative_l2: float
    values: dict[str, torch.Tensor]


def edge_cases(
    program: Program, calibration: Sequence[Mapping[str, torch.Tensor]] = (), *, seed: int = 0
) -> list[Case]:
    """Return the cases every pass is checked on.

    Calibration batches (two at most) and the example; the smallest sizes; odd sizes at batch 3, padded on either side;
    the longest sizes, up to 2,048 and to what runs in seconds.  What the program itself cannot run is left out, and so
    is what repeats another case.
    """
    chosen: list[tuple[str, dict[str, torch.Tensor]]] = []
    chosen += [(f"calibration batch {i}", dict(batch)) for i, batch in enumerate(calibration[:2])]
    if program.example_inputs:
        chosen.append(("the example inputs", dict(program.example_inputs)))
    for name, sizes, padding in _edge_shapes(program):
        chosen.append((name, sample_inputs(program, sizes, seed=seed, padding=padding)))
    cases: list[Case] = []
    for name, inputs in chosen:
        if any(_alike(program, inputs, case.inputs) for case in cases):
            continue
        if (outputs := _try_run(program, inputs)) is not None:
            cases.append(Case(name, inputs, outputs))
    return cases


def _edge_shapes(program: Program) -> list[tuple[str, dict[str, int], Padding]]:
    names = program.dims.names
    varies = any(name != "batch" for name in names)
    odd = _sizes(program, 3 if varies else 2, 7)
    longest = _sizes(program, 1, _LONGEST)
    while cost(program, longest).flops > _CASE_FLOPS and (shorter := _halved(program, longest)) != longest:
        longest = shorter
    length = max((size for name, size in longest.items() if name != "batch"), default=1)
    shapes: list[tuple[str, dict[str, int], Padding]] = [
        ("the smallest sizes", {name: program.dims[name].low for name in names}, "none"),
        ("odd sizes, right-padded", odd, "right"),
        ("odd sizes, left-padded", odd, "left"),
        (f"long inputs ({length})", longest, "none"),
    ]
    return [(name, {**example_sizes(program), **sizes}, padding) for name, sizes, padding in shapes]


def _sizes(program: Program, batch: int, other: int) -> dict[str, int]:
    wanted = {name: batch if name == "batch" else other for name in program.dims.names}
    return {name: max(program.dims[name].low, program.dims.largest(name, size)) for name, size in wanted.items()}


def _halved(program: Program, sizes: dict[str, int]) -> dict[str, int]:
    return {n: s if n == "batch" else max(program.dims[n].low, s // 2) for n, s in sizes.items()}


def _alike(program: Program, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two cases have the same shapes and the same padding; other values do not matter."""
    return all(
        one[spec.name].shape == other[spec.name].shape
        and (not is_mask(spec) or torch.equal(one[spec.name], other[spec.name]))
        for spec in program.inputs
    )


def _try_run(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    try:
        return program.run(inputs)
    except (XformoptError, RuntimeError, IndexError):
        return None


def relative_l2(reference: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None = None) -> float:
    """Return ``|value - reference| / |reference|`` over valid positions; infinite where a value is not finite.

    Booleans and integers count as 0 or infinity: equal or not.
    """
    if reference.shape != value.shape:
        return float("inf")
    if not reference.is_floating_point():
        equal = (reference == value) if valid is None else (reference == value) | ~valid
        return 0.0 if bool(equal.all()) else float("inf")
    if valid is not None and bool(valid.all()):
        valid = None
    difference = value - reference
    if valid is not None:
        difference = torch.where(valid, difference, 0.0)
        reference = torch.where(valid, reference, 0.0)
    error, norm = _norm(difference), _norm(reference)
    if error != error or norm != norm or norm == float("inf"):
        return _relative_l2_of_infinite(reference, value, valid)
    return error / norm if norm else error


def _norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _relative_l2_of_infinite(reference: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None) -> float:
    """Compare values of which some are infinite (mask constants): those must be equal, the rest close."""
    value = value if valid is None else torch.where(valid, value, 0.0)
    finite = reference.isfinite()
    same = value[~finite] == reference[~finite]
    if not bool(same.all()) or not bool(value[finite].isfinite().all()):
        return float("inf")
    norm = _norm(reference[finite])
    return _norm(value[finite] - reference[finite]) / (norm or 1.0)


def run_region(region: Region, values: Mapping[str, Any], *, double: bool = False) -> dict[str, Any]:
    """Execute a region on named boundary values; returns every value in it by name.

    With ``double``, floating-point values, parameters and casts to float32 are taken in float64.
    """
    found: dict[fx.Node, Any] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if value is torch.float32 else value

    with torch.no_grad():
        for node in region.graph.nodes:
            if node.op == "placeholder":
                value = values[str(node.target)]
            elif node.op == "get_attr":
                value = region.parameters[str(node.target)]
            elif node.op == "output":
                break
            else:
                args = fx.map_arg(node.args, found.__getitem__)
                kwargs = fx.map_arg(node.kwargs, found.__getitem__)
                kwargs = {k: widen(v) for k, v in kwargs.items()} if double else kwargs
                value = call(node.target, args, kwargs)
            found[node] = widen(value) if double else value
    return {str(node.meta["name"]): value for node, value in found.items()}


def verify_regions(program: Program, fired: Sequence[Fired], case: Case) -> tuple[Deviation | None, float]:
    """Run ``program`` (the pass's input) on a case, checking each rewrite as soon as its boundary values exist.

    Returns:
        The first deviation beyond the tolerance of its precision, if any, and the largest relative L2 met.
    """
    checker = _Checker(program, fired, case)
    interpret(program, case.inputs, observe=checker.observe)
    return checker.deviation, checker.worst


class _Checker:
    """Holds boundary values just long enough to run every region once."""

    def __init__(self, program: Program, fired: Sequence[Fired], case: Case) -> None:
        self.original = {node.name for node in program.graph.nodes}
        self.program = program
        self.case = case
        self.deviation: Deviation | None = None
        self.worst = 0.0
        self.values: dict[str, Any] = {}
        self.readers: Counter[str] = Counter()
        self.waiting: dict[str, list[int]] = defaultdict(list)
        self.missing: dict[int, int] = {}
        self.fired = fired
        for index, rewrite in enumerate(fired):
            names = self._needed(rewrite)
            self.missing[index] = len(names)
            for name in names:
                self.readers[name] += 1
                self.waiting[name].append(index)

    def _needed(self, rewrite: Fired) -> set[str]:
        """Return the values a check waits for: the boundary, and the old results where the program computes them."""
        names = {*rewrite.before.inputs, *rewrite.after.inputs}
        return names | set(rewrite.before.outputs) if names <= self.original else names

    def observe(self, node: fx.Node, value: Any) -> None:
        """Take a value of the program, and run what was waiting for it."""
        self._arrive(node.name, value)

    def _arrive(self, name: str, value: Any) -> None:
        if not self.readers[name] or name in self.values:
            return
        self.values[name] = value
        for index in self.waiting.pop(name, []):
            self.missing[index] -= 1
            if not self.missing[index]:
                self._check(self.fired[index])

    def _check(self, rewrite: Fired) -> None:
        names = self._needed(rewrite)
        known = all(output in self.values for output in rewrite.before.outputs)
        before = self.values if known else run_region(rewrite.before, self.values)
        after = run_region(rewrite.after, self.values)
        if self.deviation is None:
            self._compare(rewrite, before, after)
        for name, value in after.items():
            if name not in names:
                self._arrive(name, value)
        for name in names:
            self.readers[name] -= 1
            if not self.readers[name]:
                del self.values[name]

    def _compare(self, rewrite: Fired, before: dict[str, Any], after: dict[str, Any]) -> None:
        error = self._error(rewrite, before, after)
        self.worst = max(self.worst, error if error != float("inf") else 0.0)
        if error <= self._tolerance(rewrite, before):
            return
        # an ill-conditioned region rounds more than that in either form: in float64 the two must still agree
        wide = self._error(
            rewrite,
            run_region(rewrite.before, self.values, double=True),
            run_region(rewrite.after, self.values, double=True),
        )
        if wide <= EXACT_TOLERANCE[torch.float32] and error < 1e-3:
            return
        names = {*rewrite.before.inputs, *rewrite.after.inputs}
        tensors = {n: self.values[n] for n in names if isinstance(self.values[n], torch.Tensor)}
        self.deviation = Deviation(rewrite, self.case.name, error, tensors)

    def _error(self, rewrite: Fired, before: dict[str, Any], after: dict[str, Any]) -> float:
        metas = {str(node.meta["name"]): node.meta["val"] for node in rewrite.before.graph.nodes if node.op != "output"}
        worst = 0.0
        for old, new in zip(rewrite.before.outputs, rewrite.after.outputs, strict=True):
            for meta, one, other in zip(*map(_parts, (metas[old], before[old], after[new])), strict=True):
                if not isinstance(one, torch.Tensor):
                    worst = max(worst, 0.0 if one == other else float("inf"))
                    continue
                valid = valid_positions(self.program, meta, self.case.inputs)
                worst = max(worst, relative_l2(one, other, valid))
        return worst

    def _tolerance(self, rewrite: Fired, before: dict[str, Any]) -> float:
        outputs = [part for name in rewrite.before.outputs for part in _parts(before[name])]
        dtypes = [value.dtype for value in outputs if isinstance(value, torch.Tensor)]
        return max((EXACT_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def _parts(value: Any) -> list[Any]:
    """Return the results of an operator that has several, or the one it has."""
    return list(value) if isinstance(value, list | tuple) else [value]
