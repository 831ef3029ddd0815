"""Recovery by distillation: that it helps, what it leaves alone, what it refuses, and what an interruption costs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from pruned import ENCODER

import xformopt.reconstruction.training as training_module
from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.match import xf
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.recover.support.distillation import Distillation
from xformopt.passes.recover.support.trainable import Part, parts_of
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program, interpret
from xformopt.reconstruction import Attempt, LowRank, Settings, align, residual_values, stopped_gradients

Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def encoder() -> Program:
    return Program.parse(ENCODER)


@pytest.fixture
def batches() -> list[Batch]:
    mask = torch.ones(8, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return [{"ids": torch.randint(0, 80, (8, 9)), "mask": mask} for _ in range(6)]


@pytest.fixture
def pruned(encoder: Program) -> Program:
    step = build_pass("prune-units", {"remove": 0.3, "importance": "magnitude", "reconstruct": False})
    return step.run(encoder, Context()).program


def recover(original: Program, program: Program, batches: list[Batch], **options: Any) -> PassResult:
    chosen = {"iterations": 40, "minutes": None, "learning_rate": 2e-3, **options}
    return build_pass("recover-accuracy", chosen).run(program, Context(calibration=batches, original=original))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def fresh(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, 80, (16, 9), generator=generator), "mask": torch.ones(16, 9, dtype=torch.long)}


@pytest.mark.parametrize("options", [{}, {"objective": "blocks"}, {"train": "lora", "rank": 4}, {"train": "norms"}],
                         ids=["answers", "blocks", "lora", "norms"])  # fmt: skip
def test_it_recovers_on_data_it_has_not_seen(
    options: dict[str, Any], encoder: Program, pruned: Program, batches: list[Batch]
) -> None:
    result = recover(encoder, pruned, batches, **options)
    assert result.changed
    wanted, before, after = (interpret(which, fresh(7))["logits"] for which in (encoder, pruned, result.program))
    assert distance(wanted, after) < (0.98 if options.get("train") == "norms" else 0.9) * distance(wanted, before)
    assert all(bool(value.isfinite().all()) for value in result.program.parameters.values())


def test_the_pipeline_hands_on_what_it_began_with(encoder: Program, batches: list[Batch]) -> None:
    first = "prune-units{remove=0.3,importance=magnitude,reconstruct=false}"
    texts = (first, "recover-accuracy{iterations=40,learning_rate=2e-3}")
    pipeline = Pipeline([parse_pass(text) for text in texts], keep_if_faster=True)
    result = pipeline.run(encoder, batches, measure=lambda before, after: (1.1, 1.2))
    pruned, record = result.history
    assert pruned.speedup == (1.1, 1.2)
    assert record.changed
    assert record.effect == "tuned"
    assert any("agreement with the original" in note for note in record.notes)
    assert record.speedup is None
    found = lower(result.program, measure=False).run(**{name: value.numpy() for name, value in batches[0].items()})
    assert distance(result.program.run(batches[0])["logits"], torch.from_numpy(found["logits"])) < 1e-5
    other = Pipeline([parse_pass("recover-accuracy{iterations=5}")]).run(encoder, batches, original=result.program)
    assert "rows of calibration data" in " ".join(other.history[0].notes)


def test_what_answers_alike_stays(encoder: Program, batches: list[Batch]) -> None:
    fused = Pipeline.recipe("exact").run(encoder, batches).program
    result = recover(encoder, fused, batches)
    assert not result.changed
    assert [refusal.reason for refusal in result.rejected] == ["it answers as the original does"]


def test_what_does_not_help_is_not_kept(encoder: Program, pruned: Program, batches: list[Batch]) -> None:
    result = recover(encoder, pruned, batches, learning_rate=1e6, iterations=20)
    assert not result.changed
    assert result.program is pruned
    assert result.rejected[-1].reason == "training made it no better on what is held out"


class InterruptedStepError(Exception):
    pass


def test_an_interrupted_recovery_ends_like_an_uninterrupted_one(
    encoder: Program, pruned: Program, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path / "whole"))
    whole = recover(encoder, pruned, batches, iterations=30).program
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path / "parts"))
    monkeypatch.setattr(training_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    real, steps = training_module.Training._step, []

    def step(self: Any, *args: Any) -> None:
        steps.append(args[1])
        if len(steps) == 18:
            raise InterruptedStepError
        real(self, *args)

    monkeypatch.setattr(training_module.Training, "_step", step)
    with pytest.raises(InterruptedStepError):
        recover(encoder, pruned, batches, iterations=30)
    resumed = recover(encoder, pruned, batches, iterations=30).program
    # the step that was interrupted is made again, and none before it
    assert steps == [*range(18), *range(17, 30)]
    assert resumed.fingerprint == whole.fingerprint != pruned.fingerprint
    assert recover(encoder, pruned, batches, iterations=30).program.fingerprint == whole.fingerprint
    assert len(steps) == 31


def test_the_budget_holds(
    encoder: Program, pruned: Program, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    monkeypatch.setattr(training_module.time, "monotonic", clock)
    result = recover(encoder, pruned, batches, minutes=1 / 60, iterations=5000)
    # by this clock a step takes 0.01 seconds when it is measured, and what else is asked for costs as much
    assert 20 <= steps_of(result) <= 100
    assert now < 3


def steps_of(result: PassResult) -> int:
    (note,) = [note for note in result.notes if note.startswith("trained in")]
    return int(note.split()[2])


def test_refusals(encoder: Program, pruned: Program, batches: list[Batch]) -> None:
    step = build_pass("recover-accuracy", {})
    with pytest.raises(PassError, match="There is no original to learn from"):
        step.run(pruned, Context(calibration=batches))
    for few in ([], batches[:1]):
        with pytest.raises(DataError, match=f"takes two batches at least, and there are {len(few)}"):
            step.run(pruned, Context(calibration=few, original=encoder))
    with pytest.raises(PassError, match="Nothing is left to train"):
        recover(encoder, pruned, batches, only=["nothing.*"])
    for option in ("minutes=-1", "rank=0", "learning_rate=0", "held_out=1", "hidden=-1", "iterations=0", "decay=-1"):
        with pytest.raises(UsageError):
            parse_pass(f"recover-accuracy{{{option}}}")


def test_what_stands_behind_rounding_is_refused_by_name(encoder: Program, batches: list[Batch]) -> None:
    text = re.sub(r"%t\b(?!:)", "%t8", str(encoder))
    line = next(line for line in text.splitlines() if line.startswith("%t:"))
    rounded = f"{line}\n%t8: f32[batch,length,32] = aten.round(%t)"
    program = Program.parse(text.replace(line, rounded), parameters=encoder.parameters)
    stopped = stopped_gradients(program, batches[0], list(program.parameters))
    assert stopped["up.w"] == "aten.round"
    assert not {"gate.w", "out.w", "norm3.w", "head.w"} & set(stopped)
    with pytest.raises(PassError, match=r"read behind aten\.round\."):
        recover(encoder, program, batches, only=["up.*", "q.*"])
    result = recover(encoder, program, batches, iterations=20)
    assert {r.value for r in result.rejected} >= {"up.w", "q.w"}
    assert all(program.parameters[n] is result.program.parameters[n] for n in ("up.w", "q.w"))


def test_only_what_is_named_is_trained(encoder: Program, pruned: Program, batches: list[Batch]) -> None:
    result = recover(encoder, pruned, batches, only=["layer.up", "head.w"], iterations=20)
    moved = {
        name for name, value in pruned.parameters.items() if not torch.equal(value, result.program.parameters[name])
    }
    assert moved == {"up.w", "up.b", "head.w"}


def test_integers_stay_and_what_is_around_them_is_trained(encoder: Program, batches: list[Batch]) -> None:
    quantized = build_pass("quantize-weights", {"bits": 4}).run(encoder, Context(calibration=batches)).program
    result = recover(encoder, quantized, batches)
    assert result.changed
    assert any("in integers stay as they are" in note for note in result.notes)
    for name, value in quantized.parameters.items():
        if not value.is_floating_point():
            assert result.program.parameters[name] is value
    scales = [name for name, part in parts_of(quantized)[0].items() if part is Part.SCALE]
    assert scales
    assert all(bool((result.program.parameters[name] > 0).all()) for name in scales)


def test_ternary_weights_are_trained_straight_through_and_packed(encoder: Program, batches: list[Batch]) -> None:
    texts = ("quantize-ternary{trainable=true}", "recover-accuracy{iterations=60,learning_rate=2e-3}", "pack-ternary")
    result = Pipeline([parse_pass(text) for text in texts]).run(encoder, batches)
    noise, trained, packed = result.history
    assert trained.drift < 0.9 * noise.drift
    assert packed.relative_l2 < 1e-5
    assert not any(node.target is xf.ternary_weight for node in result.program.nodes())


def test_the_loss_is_the_published_one(encoder: Program, pruned: Program, batches: list[Batch]) -> None:
    aligned = align(encoder, pruned)
    assert [name for name, _ in aligned.outputs] == ["logits", "hidden"]
    # the last sum is returned, so that it is no hidden value
    assert [path for path, _ in aligned.residual] == ["layer", "layer"]
    batch, mask = batches[0], batches[0]["mask"].bool().numpy()
    found: dict[str, list[np.ndarray]] = {}
    for which in (encoder, pruned):
        kept = {"logits": which.results[0], "hidden": which.results[1]}
        kept |= {str(index): node for index, (_, node) in enumerate(residual_values(which)[:2])}
        names = {node.name: key for key, node in kept.items()}

        def observe(node: Any, value: Any, names: dict[str, str] = names) -> None:
            if node.name in names:
                found.setdefault(names[node.name], []).append(value.double().numpy())

        interpret(which, batch, observe=observe)
    p, q = (np.exp(z / 3) / np.exp(z / 3).sum(1, keepdims=True) for z in found["logits"])
    wanted = 9 * (p * np.log(p / q)).sum(1).mean()
    relative = {
        key: ((one - other)[mask] ** 2).sum() / (one[mask] ** 2).sum()
        for key, (one, other) in found.items()
        if key != "logits"
    }
    wanted += relative["hidden"] + 0.5 * (relative["0"] + relative["1"]) / 2
    block = aligned.whole("answers")
    values = {name: interpret_values(program, batch, block.outputs) for name, program in
              (("original", aligned.original), ("changed", aligned.changed))}  # fmt: skip
    valid = {name: batch["mask"].bool()[..., None] for name, value in values["original"].items() if value.dim() == 3}
    named = dict(aligned.outputs)
    loss = Distillation((named["logits"],), (named["hidden"],), tuple(v for _, v in aligned.residual), 3.0, 0.5)
    assert float(loss(Attempt(lambda _: values["changed"], values["original"], {}, valid))) == pytest.approx(
        wanted, rel=1e-5
    )


def interpret_values(program: Program, batch: Batch, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def observe(node: Any, value: Any) -> None:
        if node.name in names:
            found[node.name] = value

    interpret(program, batch, observe=observe)
    return found


def test_rates_rise_and_fall() -> None:
    settings = Settings(warm_up=0.1, cosine=True)
    rates = [settings.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10:] == pytest.approx((1 + np.cos(np.pi * np.arange(90) / 90)) / 2)
    assert [Settings().rate(step, 7) for step in range(7)] == [1.0] * 7


def test_batches_are_held_out_at_equal_distances() -> None:
    assert Settings(held_out=3).judged(15) == (2, 7, 12)
    assert Settings(held_out=1).judged(2) == (1,)
    assert Settings().judged(15) == ()


def test_judging_takes_a_fifth_of_the_time_at_most() -> None:
    settings = Settings(held_out=3)
    assert [settings.judgements(60.0, one) for one in (0.0, 1.0, 2.0, 5.0, 50.0)] == [10, 10, 6, 2, 2]
    assert settings.judgements(None, 50.0) == 10
    assert Settings().judgements(60.0, 1.0) == 1


def test_an_update_of_low_rank_starts_at_nothing() -> None:
    start = torch.randn(7, 5)
    variable = LowRank(start, rank=2)
    assert torch.equal(variable.value(), start)
    with torch.no_grad():
        variable.leaf += torch.randn_like(variable.leaf)
    assert int(torch.linalg.matrix_rank(variable.result() - start)) == 2


def test_masks_angles_and_statistics_are_not_trained() -> None:
    program = Program.parse(
        """
program "m" lifted
dim batch in [1, inf]
input %x: f32[batch,8]
param %w: f32[8,8]
param %bias: f32[8]
param %large: f32[8]
param %angle: f32[8]
param %moved: f32[8]
param %seen: f32[8]
%y: f32[batch,8] = xf.linear(%x, %w, %bias)
%z: f32[batch,8] = aten.add.Tensor(%y, %large)
%a: f32[batch,8] = aten.mul.Tensor(%z, %angle)
%c: f32[batch,8] = aten.cos(%a)
%p: f32[batch,8] = aten.add.Tensor(%c, %moved)
%f: f32[batch,8] = xf.fake_quantize(%p, %seen) {bits=8}
return y=%f
""",
        parameters={
            **{name: torch.ones(8) for name in ("bias", "angle", "moved", "seen")},
            "w": torch.ones(8, 8),
            "large": torch.full((8,), -1e9),
        },
    )
    parts, refused = parts_of(program)
    assert parts == {"w": Part.WEIGHT, "bias": Part.BIAS, "moved": Part.OTHER, "seen": Part.SCALE}
    assert set(refused) == {"large", "angle"}
