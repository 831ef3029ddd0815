"""Passes that train how weights are rounded: grids by numpy, what they gain, what they leave, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import xformopt as xo
from xformopt.errors import DataError, PassError, UsageError
from xformopt.kernels.float_formats import FORMATS, unpack_floats
from xformopt.lowering import lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.quantize.support.float_grids import fit_float_grid
from xformopt.passes.quantize.support.uniform_grids import fit_grid
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program
from xformopt.program.text import target_name


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def vit() -> Program:
    torch.manual_seed(0)
    module = ViT(ViTConfig(image_size=16, in_channels=1, patch=4, width=32, depth=2, heads=2, mlp_ratio=2, classes=10))
    return Pipeline([]).run(xo.capture(module.eval(), {"pixel_values": torch.randn(2, 1, 16, 16)})).program


@pytest.fixture(scope="module")
def dit() -> Program:
    return Pipeline([]).run(xo.capture("dit-micro")).program


@pytest.fixture
def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(6, 1, 16, 16, generator=generator)} for _ in range(3)]


def run(name: str, program: Program, batches: list[dict[str, torch.Tensor]], **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=batches))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def on_target(program: Program, batch: dict[str, torch.Tensor], output: str) -> tuple[torch.Tensor, dict[str, int]]:
    artifact = lower(program, measure=False)
    found = artifact.run(**{name: value.numpy() for name, value in batch.items()})
    return torch.from_numpy(found[output]), artifact.manifest.execution


def weights() -> torch.Tensor:
    """A row of zeros, a group of zeros, a group of one sign, an outlier, and very small numbers."""
    found = torch.randn(7, 96, generator=torch.Generator().manual_seed(4))
    found[2] = 0
    found[3, 32:64] = 0
    found[4, :32] = found[4, :32].abs() + 0.5
    found[5, 7] = 40
    found[6] *= 1e-4
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_uniform_neighbours_are_floor_and_ceiling(bits: int, symmetric: bool) -> None:
    weight = weights()
    grid = fit_grid(weight, bits=bits, group=32, symmetric=symmetric, search=False)
    w, last = weight.numpy().reshape(7, 3, 32), 2**bits - 1
    low, high = np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)
    reach = np.abs(w).max(2) / np.float32(2 ** (bits - 1) - 1)
    scale = reach if symmetric else (high - low) / np.float32(last)
    scale[scale == 0] = 1
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.clip(np.rint(-low / scale), 0, last)
    np.testing.assert_array_equal(grid.scale.numpy(), scale)
    for up in (0, 1):
        codes = grid.codes(weight, torch.full_like(weight, up, dtype=torch.uint8))
        wanted = np.clip(np.floor(w / scale[..., None]) + zero[..., None] + up, 0, last)
        np.testing.assert_array_equal(codes.codes.numpy(), wanted.reshape(7, 96))
        assert codes.zero is None if symmetric else np.array_equal(codes.zero.numpy(), zero)  # type: ignore[union-attr]
        values = ((wanted - zero[..., None]) * scale[..., None]).reshape(7, 96)
        settled = grid.variable(weight).settled(torch.full_like(weight, up))
        np.testing.assert_array_equal(settled.numpy(), values.astype(np.float32))


def test_searched_ranges_lose_least_of_those_tried() -> None:
    weight = weights()
    losses = []
    for search in (False, True):
        grid = fit_grid(weight, bits=4, group=96, symmetric=False, search=search)
        variable = grid.variable(weight)
        losses.append((variable.settled(variable.untrained()) - weight).square().sum(1))
    assert bool((losses[1] <= losses[0] * 1.0001).all())
    # a single outlier leaves nothing to gain
    others = [row for row in range(len(weight)) if row != 5]
    assert float(losses[1][others].sum()) < 0.95 * float(losses[0][others].sum())


def float_scales(w: np.ndarray, name: str, kind: str) -> np.ndarray:
    """Block scales from their definitions, one group at a time."""
    size = np.abs(w).max(2)
    found = np.ones_like(size)
    largest = np.float32(FORMATS[name].largest)
    for place, m in np.ndenumerate(size):
        if m and kind == "e8m0":
            found[place] = 2.0 ** (math.floor(math.log2(m)) - math.floor(math.log2(largest)))
        elif m:
            found[place] = m / largest
    if kind == "fp16":
        return np.clip(found, 2.0**-14, 65504).astype(np.float16).astype(np.float32)
    if kind == "e4m3":
        base = found.max() / np.float32(448)
        table = np.array(FORMATS["fp8_e4m3"].values[1:127], np.float32)
        return np.array([table[np.abs(table - ratio).argmin()] for ratio in (found / base).flat]).reshape(
            found.shape
        ).astype(np.float32) * np.float32(base)
    return found


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("kind", ["e8m0", "fp16", "e4m3"])
def test_float_codes_are_the_nearest(name: str, kind: Any) -> None:
    weight = weights()
    grid = fit_float_grid(weight, format=name, kind=kind, group=32)
    w = weight.numpy().reshape(7, 3, 32)
    scale = float_scales(w, name, kind)
    packed = grid.nearest(weight)
    values = np.array(FORMATS[name].values, np.float32)
    codes = unpack_floats(packed.weight, FORMATS[name].bits).numpy()
    relative = (w / scale[..., None]).clip(-FORMATS[name].largest, FORMATS[name].largest)
    finite = values[np.isfinite(values)].astype(np.float64)
    gaps = np.abs(relative[..., None].astype(np.float64) - finite).min(-1)
    np.testing.assert_array_equal(np.abs(values[codes].astype(np.float64) - relative), gaps)
    # neighbours enclose what the format reaches, and one of them is the nearest
    variable = grid.variable(weight)
    low, high = (variable.settled(torch.full_like(weight, up)).numpy().reshape(w.shape) for up in (0, 1))
    inside = (relative * scale[..., None]).astype(np.float32)
    slack = np.abs(inside) * 1e-6
    assert ((low <= inside + slack) & (inside - slack <= high)).all()
    table = np.unique(finite)
    places = np.abs((low / scale[..., None])[..., None] - table).argmin(-1)
    np.testing.assert_allclose(high / scale[..., None], table[places + 1], rtol=1e-6, atol=1e-30)
    chosen = grid.packed(weight, variable.untrained())
    differ = values[unpack_floats(chosen.weight, FORMATS[name].bits).numpy()] != values[codes]
    assert differ.mean() < 0.01


@pytest.mark.parametrize(
    ("name", "options", "kernel"),
    [
        ("adaround", {"group": 16}, "xf.weight_only_linear"),
        ("adaround", {"group": 0, "symmetric": True, "compute": "int8", "bits": 8}, "xf.quantized_linear"),
        ("quantize-float", {"rounding": "trained", "scale": "fp16", "group": 0}, "xf.float_weight_linear"),
    ],
)
def test_training_beats_the_nearest_code_in_every_block(
    name: str, options: dict[str, Any], kernel: str, vit: Program, images: list[dict[str, torch.Tensor]]
) -> None:
    result = run(name, vit, images, iterations=40, minutes=None, **options)
    assert operators(result.program).count(kernel) == 13
    assert not {"xf.linear", "xf.linear_activation"} & set(operators(result.program))
    before, after = (float(word) for word in result.notes[0].split() if "e-" in word)
    # 8 bits leave little to gain
    assert after <= before if options.get("bits") == 8 else after < 0.9 * before
    found, execution = on_target(result.program, images[0], "logits")
    assert distance(result.program.run(images[0])["logits"], found) < 2e-3
    assert distance(vit.run(images[0])["logits"], found) < 0.3
    assert list(execution.values()) == [13]


def test_a_weight_that_an_embedding_shares_is_rounded_to_nearest() -> None:
    program = Program.parse("""
program "m" lifted
dim batch in [1, inf]
input %ids: i64[batch,3] below 20
param %table: f32[20,16]
param %w: f32[16,16]
%x: f32[batch,3,16] = aten.embedding(%table, %ids)
%y: f32[batch,3,16] = xf.linear(%x, %w)
%z: f32[batch,3,20] = xf.linear(%y, %table)
return logits=%z
""")
    batches = [{"ids": torch.arange(18).reshape(6, 3)}]
    result = run("adaround", program, batches, group=0, iterations=20, minutes=None)
    grid = fit_grid(program.parameters["table"], bits=4, group=16, symmetric=False, search=True)
    variable = grid.variable(program.parameters["table"])
    wanted = grid.codes(program.parameters["table"], variable.untrained()).packed()
    assert torch.equal(result.program.parameters["table.codes"], wanted.weight)
    assert operators(result.program).count("xf.weight_only_linear") == 2


def test_sensitive_layers_stay_in_float(vit: Program, images: list[dict[str, torch.Tensor]]) -> None:
    for name, options in (
        ("adaround", {"group": 0, "minutes": None, "iterations": 2}),
        ("quantize-float", {"group": 0, "activations": "fp6_e3m2"}),
    ):
        free = run(name, vit, images, **options)
        drift = distance(vit.run(images[0])["logits"], free.program.run(images[0])["logits"])
        held = run(name, vit, images, max_drift=0.7 * drift, **options)
        assert 0 < len(held.fired) < len(free.fired)
        assert distance(vit.run(images[0])["logits"], held.program.run(images[0])["logits"]) <= 0.7 * drift


@pytest.mark.parametrize("bits", [4, 3])
def test_few_bits_everywhere(vit: Program, images: list[dict[str, torch.Tensor]], bits: int) -> None:
    result = run("aphq", vit, images, bits=bits, iterations=20, minutes=None)
    names = operators(result.program)
    assert names.count("xf.weight_only_linear") == 13
    # norms' outputs are shared by queries, keys and values; each of those is rounded, too
    assert names.count("xf.fake_quantize") == 2 * (1 + 3 + 1 + 1 + 1) + 1
    assert {str(node.kwargs["function"]) for node in result.program.nodes() if "activation" in node.name} == {"relu"}
    assert "2 GELU became ReLU" in result.notes[0]
    found, execution = on_target(result.program, images[0], "logits")
    assert distance(result.program.run(images[0])["logits"], found) < 0.05
    assert execution == {
        "activations in 4 bits, simulated in float": 15,
        f"linear layers stored in {bits} bits, computed in float": 13,
    }


def test_eight_bits_of_activations_execute_in_integers(vit: Program, images: list[dict[str, torch.Tensor]]) -> None:
    options: dict[str, Any] = {"iterations": 2, "minutes": None, "activation_bits": 8, "attention": False}
    result = run("aphq", vit, images, relu=False, **options)
    assert result.notes[0].startswith("4 blocks reconstructed") or result.notes[0].startswith("3 blocks reconstructed")
    codes = [value for value in result.program.parameters.values() if value.dtype == torch.int8]
    assert max(int(value.max()) for value in codes) <= 7
    assert min(int(value.min()) for value in codes) >= -8
    found, execution = on_target(result.program, images[0], "logits")
    assert distance(vit.run(images[0])["logits"], found) < 0.3
    assert execution == {"linear layers executed in int8": 13}


@pytest.mark.parametrize(
    "options",
    [
        {"format": "fp4_e2m1", "activations": "fp8_e4m3"},
        pytest.param(
            {"format": "fp6_e2m3", "scale": "e4m3", "rounding": "trained", "iterations": 2, "activations": "fp6_e3m2"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_diffusion_transformer_in_low_bit_floats(options: dict[str, Any], dit: Program) -> None:
    generator = torch.Generator().manual_seed(3)
    batch = {
        "latent": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([20.0, 700.0]),
        "label": torch.tensor([1, 7]),
    }
    result = run("quantize-float", dit, [batch], **options)
    assert operators(result.program).count("xf.float_weight_linear") == len(result.fired) > 40
    found, execution = on_target(result.program, batch, "noise")
    assert distance(dit.run(batch)["noise"], found) < 0.3
    assert distance(result.program.run(batch)["noise"], found) < 0.02
    assert f"activations in {options['activations']}, simulated in float" in execution
    assert any(options["format"] in what and "made floats at load" in what for what in execution)
    if "scale" not in options:
        small = result.program.parameter_bytes
        assert small < 0.25 * dit.parameter_bytes


def with_nan(program: Program) -> Program:
    broken = program.copy()
    name = next(name for name, value in broken.parameters.items() if value.dim() == 2)
    broken.parameters[name] = broken.parameters[name] * float("nan")
    return broken


REFUSED: list[tuple[str, Callable[[Program], Program], bool, type[Exception], str]] = [
    ("adaround", lambda program: program, False, DataError, "--calibration"),
    ("aphq", lambda program: program, False, DataError, "--calibration"),
    ("quantize-float{rounding=trained}", lambda program: program, False, DataError, "--calibration"),
    ("adaround", with_nan, True, PassError, "holds NaN"),
    ("aphq", with_nan, True, PassError, "holds NaN"),
    ("quantize-float", with_nan, True, PassError, "holds NaN"),
    ("aphq{scores=classes}", lambda program: program, True, PassError, "has no output named 'classes'; it has logits"),
]


@pytest.mark.parametrize(("name", "make", "with_data", "kind", "message"), REFUSED)
def test_what_cannot_be_quantized_is_refused(
    name: str,
    make: Callable[[Program], Program],
    with_data: bool,
    kind: type[Exception],
    message: str,
    vit: Program,
    images: list[dict[str, torch.Tensor]],
) -> None:
    program = make(vit)
    text = str(program)
    with pytest.raises(kind, match=message) as caught:
        parse_pass(name).run(program, Context(calibration=images if with_data else ()))
    assert "\n" not in str(caught.value)
    assert str(program) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaround{group=48}", "group must be 0, 16, 32"),
        ("adaround{bits=3}", "bits must be 4 or 8"),
        ("adaround{iterations=0}", "iterations must be at least 1"),
        ("adaround{minutes=-1}", "minutes must be positive"),
        ("adaround{compute=int8}", "takes one symmetric scale per row"),
        ("aphq{bits=5}", "bits must be one of 2, 3, 4, 6, 8"),
        ("aphq{activation_bits=7}", "activation_bits must be 2 to 6 or 8"),
        ("aphq{drop=1}", "drop must lie in"),
        ("quantize-float{format=fp5}", "refuses format"),
        ("quantize-float{group=8}", "group must be 0, 16, 32"),
    ],
)
def test_senseless_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(text)
