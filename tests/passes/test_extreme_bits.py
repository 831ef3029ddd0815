"""Powers of two, two values and three values: codes by numpy, bit for bit, and small encoders on the target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.errors import DataError, PassError, UsageError
from xformopt.kernels.definition import xf
from xformopt.kernels.packing import unpack
from xformopt.kernels.ternary_weight import ternary_weight
from xformopt.lowering import lower
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.attention_layers import attention_linears
from xformopt.passes.quantize.quantize_shift import shift_codes
from xformopt.passes.quantize.support.ternary import elastic_ranges, packed_levels
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program
from xformopt.program.text import target_name

ENCODER = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %x: f32[batch,length,32]
input %mask: i64[batch,length]
param %qkv.w: f32[96,32]
param %qkv.b: f32[96]
param %o.w: f32[32,32]
param %up.w: f32[48,32]
param %up.b: f32[48]
param %down.w: f32[32,48]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%qkv: f32[batch,length,96] = xf.linear(%x, %qkv.w, %qkv.b)  # attention.qkv
%q: f32[batch,length,32] = aten.slice.Tensor(%qkv) {dim=2, end=32}
%k: f32[batch,length,32] = aten.slice.Tensor(%qkv) {dim=2, start=32, end=64}
%v: f32[batch,length,32] = aten.slice.Tensor(%qkv) {dim=2, start=64, end=96}
%a: f32[batch,length,32] = xf.attention(%q, %k, %v, %keep) {heads=4, kv_heads=4, scale=0.3}
%o: f32[batch,length,32] = xf.linear(%a, %o.w)  # attention.output
%s: f32[batch,length,32] = aten.add.Tensor(%o, %x)
%n: f32[batch,length,32] = xf.layer_norm(%s) {eps=1e-05}
%u: f32[batch,length,48] = xf.linear_activation(%n, %up.w, %up.b) {function=relu}  # up
%d: f32[batch,length,32] = xf.linear(%u, %down.w)  # down
%y: f32[batch,length,32] = aten.add.Tensor(%d, %s)
return y=%y valid keep %mask
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def encoder() -> Program:
    return Program.parse(ENCODER)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    x = torch.randn(3, 9, 32)
    x[1, 6:] = 50
    return [{"x": x, "mask": mask}]


def run(name: str, program: Program, batches: list[dict[str, torch.Tensor]], **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=batches))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def awkward_weights() -> torch.Tensor:
    """Powers of two and what lies half-way between them, zeros, a row of zeros, and values over 40 octaves."""
    found = torch.randn(9, 24)
    found[1] = 0
    found[2] = torch.exp2(-torch.arange(24.0)) * torch.tensor([1.0, -1.0]).repeat(12)
    found[3] = torch.exp2(torch.randn(24) * 12 - 14)
    found[4, :3] = torch.tensor([1.4142135, 1.4142137, -0.0])
    return found


@pytest.mark.parametrize("bits", [5, 6])
def test_shift_codes_are_the_nearest_powers(bits: int) -> None:
    weight = awkward_weights()
    codes, top = shift_codes(weight, bits=bits)
    w, half = weight.double().numpy(), 2 ** (bits - 1)
    with np.errstate(divide="ignore"):
        exponents = np.rint(np.log2(np.abs(w)))
    assert top == exponents.max()
    lowest = top - (half - 2)
    wanted = np.where(exponents >= lowest, np.sign(w) * 2.0 ** np.maximum(exponents, lowest), 0)
    c = codes.numpy().astype(int)
    found = np.where(c % half > 0, np.where(c >= half, -1, 1) * 2.0 ** (top - (half - 1 - c % half)), 0)
    assert np.array_equal(found, wanted)
    # a half-way weight goes to the power that is nearer in its logarithm
    assert found[4, :2].tolist() == [1.0, 2.0]
    assert shift_codes(torch.zeros(2, 3), bits=bits)[0].tolist() == [[0] * 3] * 2


def test_the_layers_of_attention_are_found(encoder: Program) -> None:
    assert attention_linears(encoder) == {"qkv", "o"}


def test_shift_weights_are_packed_and_run(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    result = run("quantize-shift", encoder, batches)
    assert [str(refusal.reason) for refusal in result.rejected] == ["it belongs to no attention (layers=attention)"] * 2
    packed = result.program.parameters["qkv.w.codes"]
    assert packed.nbytes == 96 * 32 * 5 // 8
    codes, _ = shift_codes(encoder.parameters["qkv.w"], bits=5)
    assert torch.equal(unpack(packed, 5, 32), codes)
    everything = run("quantize-shift", encoder, batches, layers="all", exponent_bits=5)
    assert operators(everything.program).count("xf.shift_linear") == 4
    for program in (result.program, everything.program):
        wanted = program.run(batches[0])["y"]
        assert 0 < distance(encoder.run(batches[0])["y"], wanted) < 0.3
        artifact = lower(program, measure=False)
        found = artifact.run(**{name: value.numpy() for name, value in batches[0].items()})["y"]
        assert distance(wanted, torch.from_numpy(found)) < 1e-5
    assert artifact.manifest.precision == "shift6-weights"
    assert artifact.manifest.execution == {
        "linear layers with powers of two stored in 6 bits, computed in float": 4,
    }


def numpy_levels(w: np.ndarray, bits: int, per_row: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return levels and scales as published, in float64."""
    axis = 1 if per_row else None
    mean = w.mean(axis=axis, keepdims=True)
    if bits == 1:
        scale = np.abs(w).mean(axis=axis, keepdims=True)
        return np.where(w - mean < 0, -1, 1), scale
    scale = 4 / 3 * np.abs(w - mean).mean(axis=axis, keepdims=True)
    return np.rint(np.clip((w - mean) / np.where(scale > 0, scale, 1), -1, 1)), scale


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("per_row", [False, True])
def test_levels_and_scales_are_those_of_the_paper(bits: int, per_row: bool) -> None:
    weight = torch.randn(9, 23, dtype=torch.float64) + 0.3
    level, scale = numpy_levels(weight.numpy(), bits, per_row)
    packed, step = packed_levels(weight, bits=bits, per_row=per_row)
    assert packed.shape == (9, -(-23 * bits // 8))
    assert np.array_equal(unpack(packed, bits, 23).numpy() * (2 if bits == 1 else 1) - 1.0, level)
    np.testing.assert_allclose(step.numpy(), scale.ravel(), rtol=1e-14)
    np.testing.assert_allclose(ternary_weight(weight, bits=bits, per_row=per_row).numpy(), level * scale, rtol=1e-14)


@pytest.mark.parametrize("bits", [1, 2])
def test_gradients_go_straight_through(bits: int) -> None:
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad(xf.ternary_weight(weight, bits=bits), weight, upstream)
    w = weight.detach()
    mean = w.mean()
    scale = w.abs().mean() if bits == 1 else (w - mean).abs().mean() * 4 / 3
    torch.testing.assert_close(found, torch.where((w - mean).abs() <= scale, upstream, 0.0), rtol=1e-12, atol=1e-12)
    rounded = (torch.randn(3, 4, requires_grad=True),)
    torch.library.opcheck(xf.ternary_weight, rounded, {"bits": bits, "per_row": True})


@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_few_levels_run_packed_and_trainable(
    weights: str, encoder: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    bits = 1 if weights == "binary" else 2
    packed = run("quantize-ternary", encoder, batches, weights=weights).program
    assert packed.parameters["qkv.w.codes"].nbytes == 96 * 32 * bits // 8
    trainable = run("quantize-ternary", encoder, batches, weights=weights, trainable=True).program
    assert torch.equal(trainable.parameters["qkv.w"], encoder.parameters["qkv.w"])
    wanted = trainable.run(batches[0])["y"]
    assert distance(wanted, packed.run(batches[0])["y"]) < 1e-6
    repacked = Pipeline([parse_pass("pack-ternary")]).run(trainable, batches)
    assert operators(repacked.program) == operators(packed)
    assert repacked.history[-1].relative_l2 < 1e-6
    assert distance(encoder.run(batches[0])["y"], wanted) > 0.1, "without training the loss is large"
    for program in (packed, trainable):
        artifact = lower(program, measure=False)
        found = artifact.run(**{name: value.numpy() for name, value in batches[0].items()})["y"]
        # a value on the edge of two codes may go either way
        assert distance(program.run(batches[0])["y"], torch.from_numpy(found)) < 5e-3
        assert artifact.manifest.execution["activations in 8 bits, simulated in float"] == 4
    assert artifact.manifest.execution[f"weights in {bits} bits, simulated in float"] == 4


def test_training_lowers_the_loss(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    """Weights and the scales of activations both learn, by the gradients of the program itself."""
    program = run("quantize-ternary", encoder, batches, trainable=True, activation_bits=4).program
    wanted = encoder.run(batches[0])["y"]
    learned = {n: p.clone().requires_grad_() for n, p in program.parameters.items() if p.is_floating_point()}
    module = program.module()
    optimizer = torch.optim.Adam(learned.values(), lr=3e-3)
    keep = batches[0]["mask"].bool()
    losses = []
    for _ in range(30):
        (found,) = torch.func.functional_call(module, learned, (batches[0]["x"], batches[0]["mask"]))
        loss = (found - wanted)[keep].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert float((learned["x.scale"].detach() - program.parameters["x.scale"]).abs()) > 0


def test_first_scales_of_activations(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    found = elastic_ranges(encoder, batches, ["x", "u"], bits=4)
    x = batches[0]["x"][batches[0]["mask"].bool()]
    assert float(found["x"].scale) == pytest.approx(2 * float(x.abs().mean()) / 7**0.5, rel=1e-6)
    assert [int(found[name].zero) for name in ("x", "u")] == [8, 0]


def test_what_is_refused(encoder: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(DataError, match="start from calibration data"):
        parse_pass("quantize-ternary").run(encoder, Context())
    assert parse_pass("quantize-ternary{activation_bits=none}").run(encoder, Context()).changed
    for name, options in (("quantize-shift", {"layers": "all"}), ("quantize-ternary", {})):
        once = run(name, encoder, batches, **options).program
        with pytest.raises(PassError, match="already quantized"):
            run(name, once, batches, **options)
    held = run("quantize-ternary", encoder, batches, max_drift=1e-9)
    assert not held.changed
    for text, message in (
        ("quantize-shift{exponent_bits=3}", "exponent_bits must be 4 or 5"),
        ("quantize-shift{layers=mlp}", "refuses layers"),
        ("quantize-ternary{activation_bits=1}", "activation_bits must lie in"),
        ("quantize-ternary{weights=quaternary}", "refuses weights"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_pass(text)
