"""Cutting programs into blocks, and training blocks: what the loss is, what is kept, and what an interruption costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

import xformopt.reconstruction.training as training_module
from xformopt.errors import DataError, ProgramError
from xformopt.passes.quantize.support.uniform_grids import fit_grid
from xformopt.program import Program
from xformopt.reconstruction import (
    Free,
    Positive,
    Reconstruction,
    Rounding,
    Settings,
    cut_at,
    cut_blocks,
    cut_like,
    reconstruct,
    run_block,
)
from xformopt.reconstruction.values import Store

PARAMETERS = "\n".join(
    f"param %{b}.{name}: f32[{shape}]"
    for b in ("a", "b")
    for name, shape in (("q", "16,16"), ("o", "16,16"), ("up", "24,16"), ("up.b", "24"), ("down", "16,24"))
)


def block(b: str, x: str) -> str:
    """One residual block from %x to %{b}_y."""
    return f"""
%{b}_n: f32[batch,T,16] = xf.layer_norm(%{x}) {{eps=1e-05}}
%{b}_h: f32[batch,T,16] = xf.linear(%{b}_n, %{b}.q)
%{b}_t: f32[batch,T,16] = xf.attention(%{b}_h, %{b}_h, %{b}_h, %keep) {{heads=2, kv_heads=2, scale=0.3}}
%{b}_p: f32[batch,T,16] = xf.linear(%{b}_t, %{b}.o)
%{b}_s: f32[batch,T,16] = aten.add.Tensor(%{x}, %{b}_p)  # blocks.{b}
%{b}_m: f32[batch,T,16] = xf.layer_norm(%{b}_s) {{eps=1e-05}}
%{b}_u: f32[batch,T,24] = xf.linear(%{b}_m, %{b}.up, %{b}.up.b)
%{b}_g: f32[batch,T,24] = xf.activation(%{b}_u) {{function=gelu}}
%{b}_d: f32[batch,T,16] = xf.linear(%{b}_g, %{b}.down)
%{b}_y: f32[batch,T,16] = aten.add.Tensor(%{b}_d, %{b}_s)  # blocks.{b}
"""


TEXT = f"""
program "m" lifted
dim batch in [1, inf]
dim T in [1, 64]
input %ids: i64[batch,T] below 50
input %mask: i64[batch,T]
param %table: f32[50,16]
param %head: f32[5,16]
{PARAMETERS}
%keep: bool[batch,T] = aten.ne.Scalar(%mask) {{other=0}}
%x: f32[batch,T,16] = aten.embedding(%table, %ids)
{block("a", "x")}
{block("b", "a_y")}
%z: f32[batch,T,5] = xf.linear(%b_y, %head)
return hidden=%b_y valid keep %mask, logits=%z
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return [{"ids": torch.randint(0, 50, (3, 9), generator=generator), "mask": mask} for _ in range(4)]


def roundings(program: Program, names: tuple[str, ...]) -> dict[str, Callable[[], Rounding]]:
    found: dict[str, Callable[[], Rounding]] = {}
    for name in names:
        weight = program.parameters[name]
        grid = fit_grid(weight, bits=4, group=weight.shape[1], symmetric=False, search=False)
        found[name] = partial(grid.variable, weight)
    return found


WEIGHTS = tuple(f"{b}.{name}" for b in "ab" for name in ("q", "o", "up", "down"))


def with_parameters(program: Program, values: dict[str, torch.Tensor]) -> Program:
    changed = program.copy()
    changed.parameters.update(values)
    return changed


def train(program: Program, batches: list[dict[str, torch.Tensor]], **settings: object) -> Reconstruction:
    chosen = Settings(**{"iterations": 40, **settings})  # type: ignore[arg-type]
    return reconstruct(program, program, batches, roundings(program, WEIGHTS), chosen)


def test_blocks_are_those_of_the_residual_stream(program: Program) -> None:
    blocks = cut_blocks(program)
    assert [(b.name, b.inputs, b.outputs) for b in blocks] == [
        ("input", ("ids",), ("x",)),
        ("blocks.a", ("mask", "x"), ("keep", "a_y")),
        ("blocks.b", ("a_y", "keep"), ("b_y",)),
        ("output", ("b_y",), ("z",)),
    ]
    assert sorted(name for b in blocks for name in b.nodes) == sorted(node.name for node in program.nodes())


def test_blocks_compute_what_the_program_does(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    values: dict[str, torch.Tensor] = dict(batches[0])
    for piece in cut_blocks(program):
        values |= run_block(program, piece, {name: values[name] for name in piece.inputs})
    wanted = program.run(batches[0])
    assert torch.equal(values["b_y"], wanted["hidden"])
    assert torch.equal(values["z"], wanted["logits"])


def test_additions_that_are_not_residual_do_not_cut() -> None:
    program = Program.parse("""
program "m" lifted
input %x: f32[2,3,4]
param %w: f32[4,4]
param %p: f32[2,3,4]
%a: f32[2,3,4] = aten.add.Tensor(%x, %p)
%c: f32[2,3,4] = aten.mul.Tensor(%a, %a)
%d: f32[2,3,4] = aten.add.Tensor(%a, %c)
%l: f32[2,3,4] = xf.linear(%d, %w)
%r: f32[2,3,4] = xf.linear(%d, %w)
%e: f32[2,3,4] = aten.add.Tensor(%l, %r)
return y=%e
""")
    assert [piece.outputs for piece in cut_blocks(program)] == [("e",)]


def test_a_changed_program_is_cut_alike_or_refused(program: Program) -> None:
    blocks = cut_blocks(program)
    changed = program.copy()
    for node in changed.nodes():
        if node.name == "a_g":
            node.kwargs = {"function": "relu"}
    assert cut_like(changed, blocks) == blocks
    assert cut_at(program, [("first", ["x"]), ("second", ["a_s"])])[1].outputs == ("keep", "a_s")
    renamed = program.copy()
    next(node for node in renamed.nodes() if node.name == "a_y").name = "elsewhere"
    with pytest.raises(ProgramError, match=r"no value %a_y, which block blocks.a"):
        cut_like(renamed, blocks)


def test_training_beats_rounding_to_nearest(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = train(program, batches, iterations=120)
    assert set(found.results) == set(WEIGHTS)
    assert [piece.name for piece in found.blocks] == ["blocks.a", "blocks.b"]
    # the first block sees the same inputs in either case
    assert found.blocks[0].after < 0.8 * found.blocks[0].before
    makers = roundings(program, WEIGHTS)
    rounded = {
        kind: {name: make().settled(result) for name, make in makers.items() for result in [choose(name, make())]}
        for kind, choose in (
            ("trained", lambda name, variable: found.results[name]),
            ("nearest", lambda name, variable: variable.untrained()),
        )
    }
    errors = {}
    for kind, values in rounded.items():
        changed = with_parameters(program, values)
        pairs = [(program.run(batch)["hidden"], changed.run(batch)["hidden"]) for batch in batches]
        errors[kind] = sum(float((one - other).square().mean()) for one, other in pairs)
    assert errors["trained"] < 0.9 * errors["nearest"]


def test_the_reported_error_is_that_of_the_block(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = train(program, batches)
    makers = roundings(program, WEIGHTS)
    values = {name: makers[name]().settled(result) for name, result in found.results.items() if name.startswith("a.")}
    changed = with_parameters(program, values)
    seen: dict[str, list[np.ndarray]] = {"before": [], "after": []}
    for batch in batches:
        for kind, run in (("before", program), ("after", changed)):
            node = next(node for node in run.graph.nodes if node.name == "a_y")
            ended = run.copy(outputs=run.outputs[:1])
            ended.output_node.args = ((next(n for n in ended.graph.nodes if n.name == node.name),),)
            seen[kind].append(ended.run(batch)["hidden"][batch["mask"] != 0].double().numpy())
    error = np.mean([np.square(a - b).mean() for a, b in zip(seen["after"], seen["before"], strict=True)])
    zeros = np.mean([np.square(a).mean() for a in seen["before"]])
    assert found.blocks[0].after == pytest.approx(error / zeros, rel=1e-4)


class StoppedError(Exception):
    """Stands for a machine that goes away."""


@pytest.mark.parametrize("last", [5, 25])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    last: int, program: Program, batches: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train(program, batches, iterations=20, drop=0.5)
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(training_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    steps = 0
    loss = training_module.Training._loss

    def counted(self: training_module.Training, step: int, count: int, before: float) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == last:
            raise StoppedError
        return loss(self, step, count, before)

    monkeypatch.setattr(training_module.Training, "_loss", counted)
    with pytest.raises(StoppedError):
        train(program, batches, iterations=20, drop=0.5)
    resumed = train(program, batches, iterations=20, drop=0.5)
    # nothing was trained twice but the step that was lost
    assert steps == 40 + 1
    assert resumed.blocks == whole.blocks
    assert all(torch.equal(result, whole.results[name]) for name, result in resumed.results.items())
    again = train(program, batches, iterations=20, drop=0.5)
    assert steps == 40 + 1
    assert again.blocks == whole.blocks


def test_a_damaged_file_is_computed_again(
    program: Program, batches: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    first = train(program, batches, iterations=5)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    assert train(program, batches, iterations=5).blocks == first.blocks


def test_a_budget_reduces_the_steps(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = train(program, batches, iterations=100_000, minutes=0.005)
    assert all(20 <= piece.iterations < 5_000 for piece in found.blocks)


def test_parameters_are_trained_towards_another_program(
    program: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    changed = program.copy()
    for node in changed.nodes():
        if node.name == "a_g":
            node.kwargs = {"function": "relu"}
    makers = {name: partial(Free, program.parameters[name], rate=0.01) for name in ("a.up", "a.up.b", "a.down")}
    progress: list[tuple[str, int, int]] = []
    found = reconstruct(
        program, changed, batches, makers, Settings(iterations=60), progress=lambda *seen: progress.append(seen)
    )
    assert [piece.name for piece in found.blocks] == ["blocks.a"]
    assert found.blocks[0].after < 0.5 * found.blocks[0].before
    assert progress[0] == ("reconstructing blocks.a", 100, 400)
    assert progress[-1] == ("reconstructed", 400, 400)


def test_scales_of_activations_are_trained(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    text = TEXT.replace("%a_h: f32", "%a_f: f32[batch,T,16] = xf.fake_quantize(%a_n, %s) {bits=4}\n%a_h: f32")
    text = text.replace("linear(%a_n", "linear(%a_f").replace("param %head", "param %s: f32[]\nparam %head")
    # far too wide a range
    changed = Program.parse(text, parameters={**program.parameters, "s": torch.tensor(3.0)})
    found = reconstruct(
        program, changed, batches, {"s": partial(Positive, torch.tensor(3.0), rate=0.05)}, Settings(iterations=60)
    )
    assert 0.1 < float(found.results["s"]) < 1.5
    assert found.blocks[0].after < 0.3 * found.blocks[0].before


def test_what_does_not_get_better_stays(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    wild = {name: partial(Free, program.parameters[name], rate=10.0) for name in WEIGHTS}
    found = reconstruct(program, program, batches, wild, Settings(iterations=3))
    assert all(torch.equal(found.results[name], program.parameters[name]) for name in WEIGHTS)
    assert all(piece.after == piece.before == 0 for piece in found.blocks)


def test_rounding_starts_at_the_weight_and_settles_on_neighbours() -> None:
    weight = torch.randn(5, 8)
    low, high = weight.floor(), weight.floor() + 1
    variable = Rounding(weight, low, high)
    torch.testing.assert_close(variable.value().detach(), weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(variable.settled(variable.untrained()), (weight + 0.5).floor())
    soft = np.clip(1.2 / (1 + np.exp(-variable.leaf.detach().double().numpy())) - 0.1, 0, 1)
    for beta in (20.0, 2.0):
        wanted = (1 - np.abs(2 * soft - 1) ** beta).sum()
        assert float(variable.penalty(beta).detach()) == pytest.approx(wanted, rel=1e-4)


def test_close_neighbours_train_as_fast_as_distant_ones() -> None:
    weight = torch.tensor([[0.1, 4.4]])
    variable = Rounding(weight, torch.tensor([[0.0, 4.0]]), torch.tensor([[0.5, 6.0]]))
    variable.value().sum().backward()
    # both lie at a fifth of their steps: the same push on the values is the same push on the leaves
    gradient = variable.leaf.grad
    assert gradient is not None
    assert float(gradient[0, 0]) == pytest.approx(float(gradient[0, 1]), rel=1e-4)
    pinned = Rounding(weight, weight, weight)
    assert torch.equal(pinned.value().detach(), weight)
    assert torch.isfinite(pinned.leaf).all()


def test_values_beyond_the_limit_lie_in_files() -> None:
    kept = {name: torch.randn(4, 25) for name in "abc"}
    with Store(500) as store:
        for name, value in kept.items():
            store.put(0, name, value)
        assert store.room == 100
        assert all(torch.equal(store.get(0, name), value) for name, value in kept.items())
        store.drop("b")
        store.drop("a")
        assert store.room == 500
        assert list(store.names()) == ["c"]


def test_refusals(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(DataError, match="--calibration"):
        train(program, [])
    broken = with_parameters(program, {"table": program.parameters["table"] * float("nan")})
    with pytest.raises(DataError, match="block input computes values that are not numbers"):
        train(broken, batches)
    for wrong, message in (
        ({"iterations": 0}, "iterations must be"),
        ({"minutes": 0.0}, "minutes must be"),
        ({"drop": 1.0}, "drop must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)  # type: ignore[arg-type]


def test_the_loop_leaves_its_programs_alone(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    before, weights = str(program), {name: value.clone() for name, value in program.parameters.items()}
    train(program, batches, iterations=2)
    assert str(program) == before
    assert all(torch.equal(value, weights[name]) for name, value in program.parameters.items())
    assert all(isinstance(node, fx.Node) for node in program.graph.nodes)
