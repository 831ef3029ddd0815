"""Run every golden file: a title, a program, ``# =>``, the expected program or ``# => unchanged: part of the reason``.

A pass with a budget fails where it cannot be met: ``# => refused: part of the message``.

Lines ``# options a=1`` and ``# assume no-padding`` after the title are for the pass and its context.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.passes import find_pass, parse_pass, pass_files
from xformopt.pipeline import Context, PassResult
from xformopt.program import Program
from xformopt.program.text import canonical_text, target_name
from xformopt.rewrite import Fired, Region
from xformopt.verify import check

GOLDEN = Path(__file__).parent / "golden"
_CASE = re.compile(r"^(?=# (?!=>|options |assume ))", re.MULTILINE)
# a lossy pass is held to its own definition elsewhere: here only gross faults show
_TOLERANCE = {"exact": 1e-6, "approximate": 0.3, "tuned": 0.3}
QUANTIZED = {
    "xf.quantized_linear",
    "xf.weight_only_linear",
    "xf.float_weight_linear",
    "xf.shift_linear",
    "xf.ternary_linear",
    "xf.quantized_embedding",
}
_TINY = 1e-30


@dataclass(frozen=True)
class Case:
    """One case of a golden file."""

    pass_name: str
    title: str
    options: str
    assume: frozenset[str]
    before: str
    expected: str

    @property
    def reason(self) -> str | None:
        found = re.fullmatch(r"unchanged(?:: (.*))?", self.expected.strip())
        return (found[1] or "") if found else None

    @property
    def refusal(self) -> str | None:
        found = re.fullmatch(r"refused: (.*)", self.expected.strip())
        return found[1] if found else None


def read_cases(path: Path) -> list[Case]:
    return [_read_case(path.stem.replace("_", "-"), text) for text in _CASE.split(path.read_text())[1:]]


def _read_case(name: str, text: str) -> Case:
    head, _, expected = text.partition("\n# =>")
    lines = head.splitlines()
    settings = dict(line[2:].split(" ", 1) for line in lines[1:] if line.startswith("# "))
    before = "\n".join(line for line in lines[1:] if not line.startswith("# "))
    assume = frozenset(settings.get("assume", "").split())
    return Case(name, lines[0][2:], settings.get("options", ""), assume, before, expected)


CASES = [
    pytest.param(case, id=f"{case.pass_name}: {case.title}")
    for path in sorted(GOLDEN.glob("*.ir"))
    for case in read_cases(path)
]


def run_case(case: Case, program: Program) -> PassResult:
    calibration = () if "no-data" in case.assume else (draw_inputs(program, case),)
    context = Context(calibration=calibration, assume=case.assume, original=program)
    return parse_pass(f"{case.pass_name}{{{case.options}}}").run(program, context)


def shapes_and_text(program: Program) -> tuple[str, list[tuple[torch.dtype, torch.Size]]]:
    text, order = canonical_text(program)
    return text, [(program.parameters[name].dtype, program.parameters[name].shape) for name in order]


def sizes_of(program: Program) -> dict[str, int]:
    return {dim.name: min(dim.high or 99, 3 + 4 * index) for index, dim in enumerate(program.dims)}


def draw(dtype: torch.dtype, shape: list[int], generator: torch.Generator, bound: int | None = None) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else bound or 2, shape, generator=generator).to(dtype)


def draw_inputs(program: Program, case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = sizes_of(program)
    drawn = {
        spec.name: draw(spec.dtype, [sizes.get(str(s), s) for s in spec.shape], generator, spec.bound)  # type: ignore[misc]
        for spec in program.inputs
    }
    return {name: as_assumed(case, name, value) for name, value in drawn.items()}


def as_assumed(case: Case, name: str, value: torch.Tensor) -> torch.Tensor:
    """Mark nothing as padding where that is assumed."""
    if "no-padding" not in case.assume or "mask" not in name or value.is_floating_point():
        return value
    return torch.zeros_like(value) if "padding" in name else torch.ones_like(value)


def assert_same(case: Case, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    tolerance = _TOLERANCE[find_pass(case.pass_name).effect]
    for name, old in before.items():
        new = after[name]
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        if not old.dtype.is_floating_point:
            assert torch.equal(new, old)
            continue
        error = (new.double() - old.double()).norm() / old.double().norm().clamp(min=_TINY)
        assert error <= tolerance, f"{name} is off by {error:.2e}"


def run_region(region: Region, inputs: dict[str, object]) -> tuple[object, ...]:
    module = fx.GraphModule(dict(region.parameters), region.graph)
    return module(*(inputs[name] for name in region.inputs))


def draw_region_inputs(program: Program, fired: Fired, case: Case) -> dict[str, object]:
    generator = torch.Generator().manual_seed(2)
    sizes = sizes_of(program)
    found: dict[str, object] = {}
    for region in (fired.before, fired.after):
        for node in region.graph.find_nodes(op="placeholder"):
            if node.name in found:
                continue
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                shape = [program.dims.evaluate(size, sizes) for size in program.dims.shape(value)]
                found[node.name] = as_assumed(case, node.name, draw(value.dtype, shape, generator))
            else:
                found[node.name] = program.dims.evaluate(program.dims.expression(value), sizes)
    return found


@pytest.mark.parametrize("case", CASES)
def test_golden(case: Case, request: pytest.FixtureRequest) -> None:
    program = Program.parse(case.before)
    text = str(program)
    if case.refusal is not None:
        with pytest.raises(PassError, match=re.escape(case.refusal)):
            run_case(case, program)
        return
    result = run_case(case, program)
    if request.config.getoption("--update-golden"):
        _update(case, result)
        return
    assert str(program) == text, "the pass changed its input"
    check(result.program, deep=True)
    assert result.changed == (shapes_and_text(program) != shapes_and_text(result.program))
    if case.reason is not None:
        assert not result.changed, f"fired:\n{result.program}"
        assert not case.reason or any(case.reason in r.reason for r in result.rejected), result.rejected
        return
    expected = Program.parse(case.expected)
    assert shapes_and_text(result.program) == shapes_and_text(expected), str(result.program)
    assert Program.parse(str(result.program), parameters=result.program.parameters)
    assert_settled(case, result.program)
    inputs = draw_inputs(program, case)
    assert_same(case, program.run(inputs), result.program.run(inputs))


def is_quantized(program: Program) -> bool:
    """Whether all linear layers, or all tables, are in integers."""
    names = {target_name(node.target) for node in program.nodes()}
    return bool(names & QUANTIZED) and not names & {"xf.linear", "xf.linear_activation", "aten.embedding"}


def assert_settled(case: Case, program: Program) -> None:
    """A second run finds nothing to do, or says that all was done."""
    if is_quantized(program) and find_pass(case.pass_name).effect != "exact":
        with pytest.raises(PassError, match="already quantized"):
            run_case(case, program)
        return
    again = run_case(case, program)
    assert not again.changed, f"a second run fires:\n{again.program}"


@pytest.mark.parametrize("case", CASES)
def test_regions_agree(case: Case) -> None:
    if case.refusal is not None:
        return
    program = Program.parse(case.before)
    result = run_case(case, program)
    assert result.changed or not result.fired
    for fired in result.fired:
        inputs = draw_region_inputs(program, fired, case)
        old, new = (run_region(region, inputs) for region in (fired.before, fired.after))
        assert_same(case, _named(old), _named(new))


def _named(values: tuple[object, ...]) -> dict[str, torch.Tensor]:
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    return {str(index): torch.as_tensor(part) for index, part in enumerate(flat)}


def _update(case: Case, result: PassResult) -> None:
    path = GOLDEN / f"{case.pass_name.replace('-', '_')}.ir"
    new = f"\n{result.program}" if result.changed else " unchanged"
    if case.reason is not None and not result.changed:
        return
    path.write_text(path.read_text().replace(f"{case.before}\n# =>{case.expected}", f"{case.before}\n# =>{new}\n"))


def test_every_pass_has_a_golden_file() -> None:
    assert {path.stem.replace("_", "-") for path in GOLDEN.glob("*.ir")} == set(pass_files())


def test_most_cases_must_not_fire() -> None:
    for path in GOLDEN.glob("*.ir"):
        cases = read_cases(path)
        stays = sum(case.reason is not None or case.refusal is not None for case in cases)
        assert stays * 2 >= len(cases), f"{path.name} has too few refusals"
