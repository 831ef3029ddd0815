"""Bits per layer: the knapsack against brute force, budgets kept, and what cannot be met said."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch

from xformopt.comparison import measured_times
from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.knapsack import undominated
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program
from xformopt.program.text import target_name

NETWORK = """
program "network" lifted
dim batch in [1, inf]
input %x: f32[batch,64]
param %a.w: f32[96,64]
param %a.b: f32[96]
param %b.w: f32[64,96]
param %c.w: f32[40,64]
param %d.w: f32[24,40]
%a: f32[batch,96] = xf.linear_activation(%x, %a.w, %a.b) {function=gelu}  # a
%b: f32[batch,64] = xf.linear(%a, %b.w)  # b
%s: f32[batch,64] = aten.add.Tensor(%b, %x)
%c: f32[batch,40] = xf.linear(%s, %c.w)  # c
%d: f32[batch,24] = xf.linear(%c, %d.w)  # d
return y=%d
"""


@pytest.fixture
def network() -> Program:
    return Program.parse(NETWORK)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(9, 64)} for _ in range(2)]


def run(program: Program, batches: list[dict[str, torch.Tensor]], **options: object) -> PassResult:
    return build_pass("mixed-precision", options).run(program, Context(calibration=batches, time=ticks))


def ticks(programs: Mapping[str, Program]) -> dict[str, float]:
    """A clock on which int8 takes a fourth and 4 bits a half of what the bytes of a float weight take."""
    pace = {"xf.linear": 1.0, "xf.quantized_linear": 1.0, "xf.weight_only_linear": 4.0}
    return {
        name: program.parameter_bytes * pace[target_name(next(iter(program.nodes())).target)]
        for name, program in programs.items()
    }


def drift(program: Program, changed: Program, batches: list[dict[str, torch.Tensor]]) -> float:
    gaps = []
    for batch in batches:
        wanted = program.run(batch)["y"].double()
        gaps.append(float((changed.run(batch)["y"].double() - wanted).norm() / wanted.norm()))
    return max(gaps)


def test_no_selection_beats_the_undominated_ones() -> None:
    generator = torch.Generator().manual_seed(4)
    things = [
        [(0.0, 0.0), *((-float(c), float(e)) for c, e in torch.randint(1, 9, (2, 2), generator=generator).tolist())]
        for _ in range(6)
    ]
    every = {
        picked: tuple(sum(things[n][i][part] for n, i in enumerate(picked)) for part in (0, 1))
        for picked in itertools.product(range(3), repeat=6)
    }
    found = undominated(things)
    assert [(s.cost, s.loss) for s in found] == [every[s.options] for s in found]
    best = {cost: min(loss for paid, loss in every.values() if paid <= cost) for cost, _ in every.values()}
    front = sorted(cost for cost, loss in best.items() if all(best[c] > loss for c in best if c < cost))
    assert [(s.cost, s.loss) for s in found] == [(cost, best[cost]) for cost in front]


def test_a_size_is_kept_at_the_least_loss(network: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = run(network, batches, budget="size", limit=0.3)
    assert found.program.parameter_bytes <= 0.3 * network.parameter_bytes
    assert "it loses least" in found.notes[0]
    # among all ways to choose that are small enough, none has a smaller sum of squares
    single = {
        (name, kind): drift(network, alone(network, batches, name, kind), batches)
        for name in "abcd"
        for kind in ("int8", "int4-weights")
        if (name, kind) != ("d", "int4-weights")
    }
    chosen = {note.split(":")[0]: note.split(": ")[1].split(" ")[0] for note in found.notes[2:]}
    losses = {}
    for kinds in itertools.product(("float", "int8", "int4-weights"), repeat=4):
        pairs = [(name, kind) for name, kind in zip("abcd", kinds, strict=True) if kind != "float"]
        if ("d", "int4-weights") not in pairs and size(network, pairs) <= 0.3 * network.parameter_bytes:
            losses[kinds] = sum(single[pair] ** 2 for pair in pairs)
    assert tuple(chosen[name] for name in "abcd") == min(losses, key=lambda kinds: losses[kinds])
    assert any("groups of 32 do not divide" in note for note in found.notes)


def alone(network: Program, batches: list[dict[str, torch.Tensor]], name: str, kind: str) -> Program:
    others = [f"{other}*" for other in "abcd" if other != name]
    text = "quantize-dynamic" if kind == "int8" else "quantize-weights"
    return build_pass(text, {"skip": others}).run(network, Context(calibration=batches)).program


def size(network: Program, pairs: list[tuple[str, str]]) -> int:
    """Count bytes: int8 has a scale a row; 4 bits have a scale and half a byte of zero point a group of 32."""
    total = network.parameter_bytes
    for name, kind in pairs:
        rows, columns = network.parameters[f"{name}.w"].shape
        groups = columns // 32
        new = rows * columns + 4 * rows if kind == "int8" else rows * (columns // 2 + 4 * groups + -(-groups // 2))
        total += new - 4 * rows * columns
    return total


def test_a_drift_is_kept_at_the_least_size(network: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    everything = run(network, batches, limit=0.9)
    assert {target_name(n.target) for n in everything.program.nodes()} & {"xf.linear", "xf.linear_activation"} == set()
    limit = 0.5 * drift(network, everything.program, batches)
    found = run(network, batches, limit=limit)
    assert drift(network, found.program, batches) <= limit
    assert everything.program.parameter_bytes < found.program.parameter_bytes < network.parameter_bytes
    tighter = run(network, batches, limit=1e-9)
    assert not tighter.changed
    assert "no layer can be quantized" in tighter.notes[0]
    assert any("the budget is better spent elsewhere: int8 drifts" in refusal.reason for refusal in tighter.rejected)


def test_what_cannot_be_reached_is_said(network: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = run(network, batches, budget="size", limit=0.01)
    share = found.program.parameter_bytes / network.parameter_bytes
    assert f"a size of 1.0% cannot be reached with these candidates: the best is {share:.1%}" in found.notes[0]
    assert "foreseen" in found.notes[1]


def test_time_is_what_the_clock_says(network: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = run(network, batches, budget="time", limit=0.45)
    # 4 bits take longer on this clock, and drift more: nothing speaks for them
    assert {note.split(": ")[1].split(" ")[0] for note in found.notes[2:]} <= {"float", "int8"}
    assert "within a time of 45.0%" in found.notes[0]
    quick = run(network, batches, limit=0.9, minimize="time")
    assert "it takes the least time" in quick.notes[0]
    assert [target_name(n.target) for n in quick.program.nodes()].count("xf.quantized_linear") == 4
    with pytest.raises(PassError, match="gave no clock"):
        parse_pass("mixed-precision{budget=time}").run(network, Context(calibration=batches))


@pytest.mark.slow
def test_it_runs_on_the_target_by_a_real_clock(network: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    clock = lambda programs: measured_times(programs, "ort-cpu", threads=1)  # noqa: E731
    steps = [parse_pass("mixed-precision{budget=drift,limit=0.05,minimize=time}")]
    result = Pipeline(steps).run(network, batches, time=clock)
    sized = Pipeline([parse_pass("mixed-precision{budget=size,limit=0.25}")]).run(network, batches)
    for found in (result.program, sized.program):
        outputs = lower(found, measure=False).run(x=batches[0]["x"].numpy())["y"]
        wanted = found.run(batches[0])["y"]
        assert float((torch.from_numpy(outputs) - wanted).norm() / wanted.norm()) < 1e-3


def test_layers_that_share_a_weight_get_the_same_bits(batches: list[dict[str, torch.Tensor]]) -> None:
    text = NETWORK.replace("return ", "%c2: f32[batch,40] = xf.linear(%x, %c.w)  # c2\nreturn z=%c2, ")
    found = run(Program.parse(text), batches, budget="size", limit=0.2)
    paths = [note.split(": ")[0] for note in found.notes[2:]]
    assert paths == ["a", "b", "c", "d"]
    assert sum(int(part) for part in found.notes[1].split(":")[0].split() if part.isdigit()) == 5


def test_what_is_refused(network: Program) -> None:
    with pytest.raises(DataError, match="there is none, nor has the program example"):
        parse_pass("mixed-precision").run(network, Context())
    quantized = parse_pass("quantize-dynamic").run(network, Context()).program
    with pytest.raises(PassError, match="already quantized"):
        parse_pass("mixed-precision").run(quantized, Context(calibration=[{"x": torch.randn(2, 64)}]))
    broken = Program.parse(NETWORK, parameters=dict(network.parameters) | {"b.w": torch.full((64, 96), torch.nan)})
    with pytest.raises(PassError, match=r"b\.w of b holds NaN"):
        parse_pass("mixed-precision").run(broken, Context(calibration=[{"x": torch.randn(2, 64)}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixed-precision{limit=0}", "limit must be positive"),
        ("mixed-precision{candidates=[int7]}", "a candidate is int8"),
        ("mixed-precision{candidates=[]}", "must name at least one"),
        ("mixed-precision{group=48}", "group must be 16"),
        ("mixed-precision{budget=money}", "refuses budget"),
    ],
)
def test_senseless_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(text)
