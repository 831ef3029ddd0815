"""Few-bit quantization of weights and activations: definitions, exact preparations, refusals, and a small ViT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from xformopt.capture import capture
from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import parse_pass
from xformopt.passes.quantize.support.layer_search import rows_in_range
from xformopt.passes.quantize.support.low_bit import Prepared, nearest_rows
from xformopt.passes.quantize.support.norm_quantizers import clipped_ranges, quantize_norms
from xformopt.passes.quantize.support.progressive_search import progressive_search
from xformopt.passes.quantize.support.quantization import dequantized
from xformopt.passes.quantize.support.refitting import Moments, refitted
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program, interpret
from xformopt.program.text import target_name

PASSES = ("quantize-low-bit", "repquant", "adalog{rounds=1,samples=64}")
HEAD = 'program "m" lifted\ndim batch in [1, inf]\n'
# the residual reads the norm, as in models that normalize behind their blocks
BLOCK = (
    HEAD
    + """
input %x: f32[batch,5,16]
param %g: f32[16]
param %c: f32[16]
param %w: f32[24,16]
param %b: f32[24]
param %v: f32[16,24]
param %t: f32[24,16]
param %u: f32[24,16]
%n: f32[batch,5,16] = xf.layer_norm(%x, %g, %c) {eps=1e-05}  # norm
%h: f32[batch,5,24] = xf.linear_activation(%n, %w, %b) {function=gelu}  # fc1
%d: f32[batch,5,16] = xf.linear(%h, %v)  # fc2
%r: f32[batch,5,16] = aten.add.Tensor(%d, %RESIDUAL)
%both: (f32[batch,5,16], f32[batch,5,16]) = xf.add_layer_norm(%d, %x) {eps=1e-05}  # norm2
%m: f32[batch,5,16] = size.getitem(%both, 0)
%s: f32[batch,5,16] = size.getitem(%both, 1)
%p: f32[batch,5,16] = xf.rms_norm(%s, %g) {eps=1e-05}  # norm3
%o: f32[batch,5,24] = xf.linear(%m, %t)  # head
%q: f32[batch,5,24] = xf.linear(%p, %u)  # last
return y=%o, z=%r, q=%q
"""
)


def block(residual: str = "x", **changes: torch.Tensor) -> Program:
    text = BLOCK.replace("%RESIDUAL", f"%{residual}")
    parameters = dict(Program.parse(text).parameters) | changes
    return Program.parse(text, parameters=parameters)


def images(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, 5, 16, generator=generator)} for _ in range(count)]


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def vit() -> tuple[Program, list[dict[str, torch.Tensor]]]:
    """A small ViT after the exact recipe, whose channels differ, and calibration data."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=16, in_channels=1, width=32, depth=2, mlp_ratio=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * torch.randn_like(parameter)).mul_(2 if parameter.dim() > 1 else 1)
    program = capture(model, model.example_inputs())
    generator = torch.Generator().manual_seed(1)
    batches = [{"pixel_values": torch.randn(8, 1, 16, 16, generator=generator)} for _ in range(4)]
    return Pipeline.recipe("exact").run(program, calibration=batches).program, batches


@pytest.mark.parametrize("name", PASSES)
def test_calibration_data_may_have_several_lengths(name: str) -> None:
    program = Program.parse("""
program "m" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %x: f32[batch,length,16]
param %g: f32[16]
param %c: f32[16]
param %w: f32[16,16]
%n: f32[batch,length,16] = xf.layer_norm(%x, %g, %c) {eps=1e-05}
%a: f32[batch,length,16] = xf.attention(%n, %n, %n) {heads=2, kv_heads=2, scale=0.35}
%o: f32[batch,length,16] = xf.linear(%a, %w)
return y=%o
""")
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(4, length, 16, generator=generator)} for length in (5, 11, 7)]
    found = parse_pass(name).run(program, Context(calibration=batches)).program
    for batch in batches:
        assert distance(program.run(batch)["y"], found.run(batch)["y"]) < 0.5


@pytest.mark.parametrize("name", PASSES)
def test_a_vision_transformer_on_the_target(
    name: str, vit: tuple[Program, list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    program, batches = vit
    options = "weight_bits=6,activation_bits=6"
    spelled = name.replace("}", f",{options}}}") if "{" in name else f"{name}{{{options}}}"
    result = Pipeline((parse_pass(spelled),)).run(program, calibration=batches)
    record = result.history[-1]
    assert 0 < record.relative_l2 < 0.25
    found = operators(result.program)
    # six layers a block and the head; per block four operands of attention, and four inputs that layers share
    assert found.count("xf.weight_only_linear") == 13
    quantizers = found.count("xf.fake_quantize") + found.count("xf.log_quantize")
    assert quantizers == 2 * 8 + 1
    assert found.count("xf.log_quantize") == {"q": 0, "r": 2, "a": 4}[name[0]]
    artifact = lower(result.program, measure=False)
    execution = artifact.manifest.execution
    assert artifact.manifest.precision == "int6-weights"
    assert execution == {
        "activations in 6 bits, simulated in float": 17,
        "linear layers stored in 6 bits, computed in float": 13,
    }
    wanted = result.program.run(batches[0])["logits"]
    lowered = torch.from_numpy(artifact.run(pixel_values=batches[0]["pixel_values"].numpy())["logits"])
    # a value that lies between two codes may fall to either side
    assert distance(wanted, lowered) < 0.1
    artifact.save(tmp_path / "saved")
    stored = sum(value.nbytes for key, value in result.program.parameters.items() if key.endswith(".codes"))
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 10
    assert stored == matrices * 6 // 8


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 8), (4, 4), (2, 4)])
def test_other_widths_on_the_target(weight_bits: int, activation_bits: int) -> None:
    options = f"weight_bits={weight_bits},activation_bits={activation_bits}"
    result = parse_pass(f"quantize-low-bit{{{options}}}").run(block(), Context(calibration=images()))
    artifact = lower(result.program, measure=False)
    assert artifact.manifest.precision == f"int{weight_bits}-weights"
    wanted, found = result.program.run(images()[0]), artifact.run(x=images()[0]["x"].numpy())
    for name, value in wanted.items():
        assert distance(value, torch.from_numpy(found[name])) < 0.05


def test_plain_rounding_is_its_definition() -> None:
    program, batches = block(), images()
    result = parse_pass("quantize-low-bit{weight_bits=4,activation_bits=4}").run(program, Context(calibration=batches))
    values: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    interpret(result.program, batches[0], observe=lambda node, value: values.update({node.name: value}))
    interpret(program, batches[0], observe=lambda node, value: seen.update({node.name: value}))
    ends = [np.array([f(run(program, b)["n"].numpy()) for b in batches]) for f in (np.min, np.max)]
    low, high = min(ends[0].min(), 0), max(ends[1].max(), 0)
    scale = np.float32((np.float64(high) - np.float64(low)) / 15)
    zero = np.rint(-np.float64(low) / np.float64(scale))
    codes = np.clip(np.rint(seen["n"].numpy() / scale) + np.float32(zero), 0, 15)
    rounded = next(node for node in result.program.nodes() if node.name.startswith("fake_quantize"))
    np.testing.assert_array_equal(values[rounded.name], (codes - np.float32(zero)) * scale)
    w = program.parameters["w"].numpy()
    lows, highs = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    steps = ((highs - lows) / np.float32(15)).astype(np.float32)
    zeros = np.rint(-lows / steps)
    stored = np.clip(np.rint(w / steps[:, None]) + zeros[:, None], 0, 15)
    np.testing.assert_array_equal(nearest_rows(program.parameters["w"], 4).codes.numpy(), stored)
    packed = result.program.parameters["w.codes"].numpy()[:, 0]
    np.testing.assert_array_equal(packed, stored[:, 0::2] + 16 * stored[:, 1::2])


def run(program: Program, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    interpret(program, batch, observe=lambda node, value: values.update({node.name: value}))
    return values


def prepared(program: Program, batches: list[dict[str, torch.Tensor]], clip: bool = True) -> Prepared:
    return quantize_norms(program, Context(calibration=batches), bits=4, skip=(), clip=clip)


@pytest.mark.parametrize("residual", ["x", "n"])
@pytest.mark.parametrize("clip", [False, True])
def test_quantizers_behind_norms_become_one_exactly(residual: str, clip: bool) -> None:
    spread = torch.logspace(-1, 1, 16)
    program, batches = block(residual, g=spread, c=torch.linspace(-3, 3, 16)), images()
    ready = prepared(program, batches, clip)
    assert len(ready.settled) == 3
    for batch in batches:
        for name, value in program.run(batch).items():
            assert distance(value, ready.program.run(batch)[name]) < 1e-6
    restores = [name for name in operators(ready.program) if name.startswith("aten.mul")]
    assert len(restores) == (residual == "n")


def test_the_one_quantizer_has_the_codes_of_all_channels() -> None:
    program, batches = block(g=torch.logspace(-1, 1, 16), c=torch.linspace(-3, 3, 16)), images()
    ready = prepared(program, batches, clip=False)
    seen = np.concatenate([run(program, batch)["n"].reshape(-1, 16).numpy() for batch in batches]).astype(np.float64)
    scale = (seen.max(0) - seen.min(0)) / 15
    zero = np.rint(-seen.min(0) / scale)
    wanted = np.rint(seen / scale) + zero
    value, shared = next(iter(ready.settled.items()))
    assert shared.scale == pytest.approx(scale.mean(), rel=1e-6)
    assert shared.zero == round(zero.mean())
    changed = np.concatenate([run(ready.program, batch)[value].reshape(-1, 16).numpy() for batch in batches])
    found = np.rint(changed / shared.scale) + shared.zero
    # in single precision a value between two codes may fall to either side
    assert (found == wanted).mean() > 0.998
    assert np.abs(found - wanted).max() <= 1
    np.testing.assert_allclose(
        ready.program.parameters["g_1"], program.parameters["g"].double().numpy() * shared.scale / scale, rtol=1e-5
    )


def test_clipping_leaves_less_error() -> None:
    rows = torch.randn(4, 500, dtype=torch.float64)
    rows[0, 0], rows[1, 1] = 9.0, -9.0
    low, high = clipped_ranges(rows, 4)
    errors = []
    for a, b in ((rows.amin(1), rows.amax(1)), (low, high)):
        scale = ((b - a) / 15).unsqueeze(1)
        zero = (-a.unsqueeze(1) / scale).round()
        codes = ((rows / scale).round() + zero).clamp(0, 15)
        errors.append(((codes - zero) * scale - rows).square().sum(1))
    assert bool((errors[1] < errors[0]).all())
    assert high[0] < 9
    assert low[1] > -9


def test_refitted_weights_lose_less_than_rounded_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    y = torch.round(x / 3) * 3 + 0.2
    weight, bias = torch.randn(10, 24, generator=generator), torch.randn(10, generator=generator)
    zeros = torch.zeros(24, 24, dtype=torch.float64)
    seen = Moments(zeros.clone(), zeros.clone(), zeros[0].clone(), zeros[0].clone())
    seen.add(x[:150], y[:150])
    seen.add(x[150:], y[150:])
    layer = refitted(weight, bias, seen, 4)
    assert layer.bias is not None
    steps = layer.weight.weight.flatten(1)
    codes = torch.stack((steps & 15, steps >> 4), -1).flatten(1)
    assert layer.weight.zero is not None
    matrix = (codes.float() - layer.weight.zero.float()) * layer.weight.scale
    wanted = x @ weight.t() + bias
    found = y @ matrix.t() + layer.bias
    plain = y @ dequantized(nearest_rows(weight, 4)).t() + bias
    assert distance(wanted, found) < 0.9 * distance(wanted, plain)
    # nothing is left of the mean
    assert float((found - wanted).mean(0).abs().max()) < 1e-3


def test_the_search_finds_the_least_of_every_problem() -> None:
    least = torch.tensor([[0.13, 0.87], [0.5, 0.5], [0.99, 0.02]], dtype=torch.float64)
    found = progressive_search(lambda tried: (tried - least).square().sum(1), 3, (8, 8))
    assert float((found - least).abs().max()) < 0.01


def test_adaptive_logarithms_take_their_shift_back() -> None:
    program, batches = block(), images()
    wide = parse_pass("adalog{weight_bits=8,activation_bits=8,rounds=1}").run(program, Context(calibration=batches))
    log = next(node for node in wide.program.nodes() if target_name(node.target) == "xf.log_quantize")
    assert (log.kwargs["denominator"], log.kwargs["round_table"]) == (37, True)
    assert 10 <= int(str(log.kwargs["numerator"])) <= 138
    shifted = log.args[0]
    assert isinstance(shifted, torch.fx.Node)
    assert shifted.args[1] == 0.16997
    layer = next(iter(log.users))
    codes, scale, zero = (wide.program.parameters[str(layer.args[i].target)] for i in (1, 2, 3))  # type: ignore[union-attr]
    matrix = (codes.flatten(1).numpy().astype(np.float64) - zero.numpy()) * scale.numpy()
    bias = wide.program.parameters[str(layer.args[4].target)]  # type: ignore[union-attr]
    np.testing.assert_allclose(bias, -0.16997 * matrix.sum(1), rtol=1e-5, atol=1e-6)
    assert distance(program.run(batches[0])["z"], wide.program.run(batches[0])["z"]) < 0.05


def test_rows_without_cuts_are_rounded_to_nearest() -> None:
    weight = torch.randn(7, 13)
    whole, nearest = rows_in_range(weight, torch.zeros(7, 2), 4), nearest_rows(weight, 4)
    assert torch.equal(dequantized(whole), dequantized(nearest))


@pytest.mark.parametrize("name", PASSES)
def test_a_weight_that_layers_share_is_stored_once(name: str) -> None:
    text = HEAD + (
        "input %x: f32[batch,5,16]\nparam %w: f32[16,16]\n%a: f32[batch,5,16] = xf.linear(%x, %w)\n"
        "%y: f32[batch,5,16] = xf.linear(%a, %w)\nreturn y=%y\n"
    )
    program = Program.parse(text)
    result = parse_pass(name).run(program, Context(calibration=images()))
    readers = [node for node in result.program.nodes() if target_name(node.target) == "xf.weight_only_linear"]
    assert len({node.args[1] for node in readers}) == 1
    assert sum("codes" in key for key in result.program.parameters) == 1


def nan_norm() -> Program:
    return block(c=torch.full((16,), float("nan")))


def constant_norm() -> Program:
    return block(g=torch.zeros(16), c=torch.full((16,), 2.0))


REFUSED: list[tuple[Callable[[], Program], bool, type[Exception], str]] = [
    (block, False, DataError, "--calibration"),
    (nan_norm, True, DataError, "NaN or infinite"),
    (constant_norm, True, DataError, "the input x of fc1 is always 2"),
    (lambda: block(v=torch.full((16, 24), float("inf"))), True, PassError, "v of fc2 holds NaN"),
]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("make", "with_data", "kind", "message"), REFUSED)
def test_what_cannot_be_quantized_is_refused(
    name: str, make: Callable[[], Program], with_data: bool, kind: type[Exception], message: str
) -> None:
    program = make()
    text = str(program)
    with pytest.raises(kind, match=message) as caught:
        parse_pass(name).run(program, Context(calibration=images() if with_data else ()))
    assert "\n" not in str(caught.value)
    assert str(program) == text


@pytest.mark.parametrize("name", PASSES)
def test_a_quantized_program_is_refused(name: str) -> None:
    once = parse_pass("quantize-low-bit{activations=token}").run(block(), Context()).program
    with pytest.raises(PassError, match="is already quantized"):
        parse_pass(name).run(once, Context(calibration=images()))


@pytest.mark.parametrize("name", PASSES[1:])
def test_a_norm_with_a_dead_channel_stays_as_it_is(name: str) -> None:
    weight, bias = torch.ones(16), torch.zeros(16)
    weight[3] = 0
    program, batches = block(g=weight, c=bias), images()
    result = parse_pass(name).run(program, Context(calibration=batches))
    reasons = [each.reason for each in result.rejected]
    assert reasons == ["channel 3 of the norm's output is always 0, so it has no range"] * 2
    wanted, found = program.run(batches[0]), result.program.run(batches[0])
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert distance(wanted["z"], found["z"]) < 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize-low-bit{weight_bits=5}", "weight_bits must be 2, 3, 4, 6 or 8"),
        ("quantize-low-bit{activation_bits=9}", "activation_bits must lie in"),
        ("quantize-low-bit{percentile=30}", "percentile must lie in"),
        ("repquant{weight_bits=1}", "weight_bits must be"),
        ("adalog{samples=0}", "samples must be positive"),
        ("adalog{rounds=0}", "rounds must be positive"),
    ],
)
def test_senseless_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(text)
