"""Quantization passes: what they refuse, how sensitive layers are kept, and a small encoder from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.observers import Moments
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.quantize.smooth_outliers import expected_error, smoothing_scale
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.pipeline.recipes import load_recipe
from xformopt.program import Program
from xformopt.program.text import target_name

ENCODER = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %ids: i64[batch,length] below 80
input %mask: i64[batch,length]
param %table: f32[80,64]
param %q.w: f32[64,64]
param %q.b: f32[64]
param %o.w: f32[64,64]
param %norm.w: f32[64]
param %norm.b: f32[64]
param %up.w: f32[96,64]
param %up.b: f32[96]
param %down.w: f32[64,96]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%x: f32[batch,length,64] = aten.embedding(%table, %ids)
%n: f32[batch,length,64] = xf.layer_norm(%x, %norm.w, %norm.b) {eps=1e-05}  # layer.norm
%q: f32[batch,length,64] = xf.linear(%n, %q.w, %q.b)  # layer.attention.query
%a: f32[batch,length,64] = xf.attention(%q, %q, %q, %keep) {heads=4, kv_heads=4, scale=0.25}  # layer.attention
%o: f32[batch,length,64] = xf.linear(%a, %o.w)  # layer.attention.output
%s: f32[batch,length,64] = aten.add.Tensor(%o, %x)  # layer
%m: f32[batch,length,64] = xf.layer_norm(%s) {eps=1e-05}  # layer.norm2
%u: f32[batch,length,96] = xf.linear(%m, %up.w, %up.b)  # layer.up
%g: f32[batch,length,96] = xf.activation(%u) {function=gelu}  # layer.act
%d: f32[batch,length,64] = xf.linear(%g, %down.w)  # layer.down
%t: f32[batch,length,64] = aten.add.Tensor(%d, %s)  # layer
%pooled: f32[batch,64] = xf.mean_pool(%t, %mask) {eps=1e-09}  # pool
return hidden=%t valid keep %mask, pooled=%pooled
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def encoder() -> Program:
    return Program.parse(ENCODER)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(4, 15, dtype=torch.long)
    mask[1, 9:] = 0
    return [{"ids": torch.randint(0, 80, (4, 15)), "mask": mask} for _ in range(3)]


def run(name: str, program: Program, batches: list[dict[str, torch.Tensor]], **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=batches))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


DRIFT = {"int8": 0.03, "int8-static": 0.1, "int4": 0.25}


@pytest.mark.parametrize("recipe", list(DRIFT))
def test_recipes_run_on_the_target(
    recipe: str, encoder: Program, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    result = Pipeline.recipe(recipe).run(encoder, calibration=batches)
    lossy = [record for record in result.history if record.effect != "exact"]
    assert all(record.changed and 0 < record.relative_l2 < DRIFT[recipe] for record in lossy)
    artifact = lower(result.program, measure=False)
    given = {name: value.numpy() for name, value in batches[0].items()}
    found = torch.from_numpy(artifact.run(**given)["pooled"])
    assert distance(encoder.run(batches[0])["pooled"], found) < DRIFT[recipe]
    assert distance(result.program.run(batches[0])["pooled"], found) < 1e-3
    artifact.save(tmp_path / "saved")
    stored = sum(tensor.nbytes for tensor in result.program.parameters.values())
    assert stored < encoder.parameter_bytes * 0.6


def test_the_artifact_says_what_executes_in_integers(encoder: Program) -> None:
    int8 = lower(Pipeline.recipe("int8").run(encoder).program, measure=False).manifest
    assert int8.precision == "int8"
    assert int8.execution == {
        "linear layers executed in int8": 4,
        "tables of embeddings stored in 8 bits, computed in float": 1,
    }
    int4 = lower(Pipeline.recipe("int4").run(encoder).program, measure=False).manifest
    assert int4.precision == "int4-weights"
    assert int4.execution == {
        "linear layers stored in 4 bits, computed in float": 4,
        "tables of embeddings stored in 4 bits, computed in float": 1,
    }
    exact = lower(encoder, measure=False).manifest
    assert (exact.precision, exact.execution) == ("fp32", {"linear layers in float": 4})


def test_quantized_recipes_end_with_what_the_exact_one_does() -> None:
    exact = load_recipe("exact")
    for name in DRIFT:
        assert load_recipe(name)[: len(exact)] == exact


@pytest.mark.parametrize("observer", ["min-max", "percentile", "mse", "entropy"])
def test_static_ranges_compute_the_same_almost(
    observer: str, encoder: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    result = run("quantize-static", encoder, batches, observer=observer)
    assert operators(result.program).count("xf.quantized_linear") == 4
    assert distance(encoder.run(batches[0])["pooled"], result.program.run(batches[0])["pooled"]) < 0.05
    found = lower(result.program, measure=False).run(**{k: v.numpy() for k, v in batches[0].items()})
    assert distance(result.program.run(batches[0])["pooled"], torch.from_numpy(found["pooled"])) < 1e-2


def test_smoothing_is_exact_and_eases_quantization(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    parameters = dict(encoder.parameters)
    outliers = torch.ones(64)
    outliers[[3, 17]] = 60.0
    parameters["norm.w"] = parameters["norm.w"] * outliers
    parameters["q.w"] = parameters["q.w"] / outliers
    spiky = Program.parse(ENCODER, parameters=parameters)
    smoothed = run("smooth-outliers", spiky, batches)
    assert len(smoothed.fired) == 2
    for batch in batches:
        for name, value in spiky.run(batch).items():
            assert distance(value, smoothed.program.run(batch)[name]) < 1e-6
    # s as published, from the calibration data by numpy
    seen = np.concatenate([norm_output(spiky, batch) for batch in batches])
    scale = np.sqrt(np.abs(seen).max(0) / np.abs(parameters["q.w"].numpy()).max(0))
    np.testing.assert_allclose(smoothed.program.parameters["q.w_1"], parameters["q.w"].numpy() * scale, rtol=1e-5)
    wanted = spiky.run(batches[0])["pooled"]
    plain, eased = (run("quantize-static", p, batches).program for p in (spiky, smoothed.program))
    assert distance(wanted, eased.run(batches[0])["pooled"]) < 0.7 * distance(wanted, plain.run(batches[0])["pooled"])


def test_what_no_norm_can_take_is_multiplied_where_it_pays(
    encoder: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    parameters = dict(encoder.parameters)
    outliers = torch.ones(96)
    outliers[[5, 40]] = 60.0
    parameters["up.w"] = parameters["up.w"] * outliers.unsqueeze(1)
    parameters["down.w"] = parameters["down.w"] / outliers
    spiky = Program.parse(ENCODER, parameters=parameters)
    smoothed = run("smooth-outliers", spiky, batches, search=True, multiply=True)
    assert operators(smoothed.program).count("aten.mul.Tensor") == operators(spiky).count("aten.mul.Tensor") + 1
    assert any("not worth a multiplication" in rejected.reason for rejected in smoothed.rejected)
    for batch in batches:
        for name, value in spiky.run(batch).items():
            assert distance(value, smoothed.program.run(batch)[name]) < 1e-6
    wanted = spiky.run(batches[0])["pooled"]
    plain, eased = (run("quantize-static", p, batches).program for p in (spiky, smoothed.program))
    assert distance(wanted, eased.run(batches[0])["pooled"]) < 0.7 * distance(wanted, plain.run(batches[0])["pooled"])


def test_the_expected_error_is_what_rounding_leaves() -> None:
    x, weight = torch.randn(400, 32).double() * torch.linspace(0.1, 3, 32), torch.randn(48, 32).double()
    seen = Moments(x.amin(0), x.amax(0), x.square().mean(0))
    scale = smoothing_scale(seen, weight, 0.6)
    step = float((x / scale).max() - (x / scale).min()) / 255
    codes = (weight * scale / ((weight * scale).abs().amax(1, keepdim=True) / 127)).round()
    rounded = ((x / scale) / step).round() * step @ (codes * (weight * scale).abs().amax(1, keepdim=True) / 127).t()
    found = float((rounded - x @ weight.t()).square().sum(1).mean())
    assert expected_error(scale, seen, weight) == pytest.approx(found, rel=0.15)


def test_salient_channels_are_scaled_exactly_and_lose_less(
    encoder: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    parameters = dict(encoder.parameters)
    outliers = torch.ones(64)
    outliers[[3, 17]] = 30.0
    parameters["norm.w"] = parameters["norm.w"] * outliers
    spiky = Program.parse(ENCODER, parameters=parameters)
    scaled = run("scale-salient-channels", spiky, batches)
    assert scaled.fired
    wanted = spiky.run(batches[0])["hidden"]
    assert distance(wanted, scaled.program.run(batches[0])["hidden"]) < 1e-6
    # s is a power of mean|X|, as published, by numpy: on a logarithmic scale the two are in proportion
    seen = np.abs(np.concatenate([norm_output(spiky, batch) for batch in batches])).mean(0)
    scale = np.log((scaled.program.parameters["q.w_1"] / parameters["q.w"]).double().numpy().mean(0))
    line = np.polyfit(np.log(seen), scale, 1)
    np.testing.assert_allclose(np.polyval(line, np.log(seen)), scale, atol=1e-5)
    assert float(line[0] * 20) == pytest.approx(round(float(line[0] * 20)), abs=1e-3)
    assert abs(scale.max() + scale.min()) < 1e-5
    plain, eased = (run("quantize-weights", p, batches).program for p in (spiky, scaled.program))
    assert distance(wanted, eased.run(batches[0])["hidden"]) < distance(wanted, plain.run(batches[0])["hidden"])


def norm_output(program: Program, batch: dict[str, torch.Tensor]) -> np.ndarray:
    values = program.parameters["table"][batch["ids"]]
    normal = torch.nn.functional.layer_norm(
        values, (64,), program.parameters["norm.w"], program.parameters["norm.b"], 1e-5
    )
    return normal[batch["mask"].bool()].numpy()


def test_gptq_loses_less_than_the_nearest_code(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    wanted = encoder.run(batches[0])["hidden"]
    losses = [
        distance(wanted, run("quantize-weights", encoder, batches, method=method).program.run(batches[0])["hidden"])
        for method in ("gptq", "nearest")
    ]
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("name", ["quantize-dynamic", "quantize-static", "quantize-weights"])
def test_sensitive_layers_stay_in_float(name: str, encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    parameters = dict(encoder.parameters)
    # one weight of a row drowns the others
    parameters["up.w"] = parameters["up.w"].clone()
    parameters["up.w"][:, 0] *= 300
    program = Program.parse(ENCODER, parameters=parameters)
    free = run(name, program, batches)
    drift = max(distance(value, free.program.run(batches[0])[key]) for key, value in program.run(batches[0]).items())
    held = run(name, program, batches, max_drift=0.9 * drift)
    found = max(distance(value, held.program.run(batches[0])[key]) for key, value in program.run(batches[0]).items())
    assert found <= 0.9 * drift
    assert 0 < len(held.fired) < len(free.fired)
    assert any("it is sensitive" in rejected.reason for rejected in held.rejected)
    assert "kept in floating point" in held.notes[0]


def test_a_drift_that_nothing_reaches_leaves_everything(
    encoder: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    result = run("quantize-dynamic", encoder, batches, max_drift=1e-9)
    assert not result.changed
    assert "no layer can be quantized" in result.notes[0]
    loose = run("quantize-dynamic", encoder, batches, max_drift=0.9)
    assert "all 4 layers quantized" in loose.notes[0]


def test_weights_within_seven_bits(encoder: Program) -> None:
    result = run("quantize-dynamic", encoder, [], reduce_range=True)
    assert max(int(p.abs().max()) for p in result.program.parameters.values() if p.dtype == torch.int8) == 63


def with_weight(value: float) -> Program:
    parameters = dict(Program.parse(ENCODER).parameters)
    parameters["o.w"] = parameters["o.w"].clone()
    parameters["o.w"][3] = value
    return Program.parse(ENCODER, parameters=parameters)


def with_constant_input() -> Program:
    parameters = dict(Program.parse(ENCODER).parameters)
    parameters["norm.w"], parameters["norm.b"] = torch.zeros(64), torch.full((64,), 2.0)
    return Program.parse(ENCODER, parameters=parameters)


def with_nan_table() -> Program:
    parameters = dict(Program.parse(ENCODER).parameters)
    parameters["table"] = parameters["table"] * float("nan")
    return Program.parse(ENCODER, parameters=parameters)


REFUSED: list[tuple[str, Callable[[], Program], bool, type[Exception], str]] = [
    ("quantize-static", lambda: Program.parse(ENCODER), False, DataError, "--calibration"),
    ("smooth-outliers", lambda: Program.parse(ENCODER), False, DataError, "--calibration"),
    ("scale-salient-channels", lambda: Program.parse(ENCODER), False, DataError, "--calibration"),
    ("quantize-weights{method=gptq}", lambda: Program.parse(ENCODER), False, DataError, "--calibration"),
    ("quantize-dynamic{max_drift=0.1}", lambda: Program.parse(ENCODER), False, DataError, "max_drift measures layers"),
    ("quantize-static", with_constant_input, True, DataError, "layer.attention.query is always 2"),
    ("quantize-static", with_nan_table, True, DataError, "NaN or infinite"),
    ("quantize-embedding", with_nan_table, False, PassError, "table table"),
    *(
        (name, lambda: with_weight(float("nan")), True, PassError, "o.w of layer.attention.output holds NaN")
        for name in ("quantize-dynamic", "quantize-static", "quantize-weights")
    ),
]


@pytest.mark.parametrize(("name", "make", "with_data", "kind", "message"), REFUSED)
def test_what_cannot_be_quantized_is_refused(
    name: str,
    make: Callable[[], Program],
    with_data: bool,
    kind: type[Exception],
    message: str,
    batches: list[dict[str, torch.Tensor]],
) -> None:
    program = make()
    text = str(program)
    with pytest.raises(kind, match=message) as caught:
        parse_pass(name).run(program, Context(calibration=batches if with_data else ()))
    assert "\n" not in str(caught.value)
    assert str(program) == text


@pytest.mark.parametrize("name", ["quantize-dynamic", "quantize-weights", "quantize-embedding"])
def test_a_quantized_program_is_refused(name: str, encoder: Program) -> None:
    once = run(name, encoder, []).program
    with pytest.raises(PassError, match="is already quantized"):
        run(name, once, [])


def test_quantized_layers_may_be_mixed(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    stored = run("quantize-weights", encoder, [], skip=["layer.attention*"]).program
    both = run("quantize-dynamic", stored, []).program
    counts = [operators(both).count(name) for name in ("xf.weight_only_linear", "xf.quantized_linear", "xf.linear")]
    assert counts == [2, 2, 0]


def test_a_row_of_zeros_is_no_obstacle(batches: list[dict[str, torch.Tensor]]) -> None:
    program = with_weight(0.0)
    for name in ("quantize-dynamic", "quantize-weights"):
        found = run(name, program, batches).program.run(batches[0])["pooled"]
        assert distance(program.run(batches[0])["pooled"], found) < 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize-weights{group=48}", "group must be 16, 32"),
        ("quantize-weights{bits=3}", "bits must be 4 or 8"),
        ("quantize-embedding{group=7}", "group must be 16, 32"),
        ("quantize-static{percentile=30}", "percentile must lie in"),
        ("quantize-static{observer=guess}", "refuses observer"),
        ("smooth-outliers{alpha=1.5}", "alpha must lie in"),
    ],
)
def test_senseless_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(text)
