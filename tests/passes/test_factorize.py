"""Factorized weights: errors by numpy, budgets kept, sensitivity measured, full rank exact, the artifact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruned import ENCODER
from torch import fx

import xformopt as xo
from xformopt.analysis import cost
from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.factorize.support.layers import find_candidates, measured_loss
from xformopt.passes.factorize.support.low_rank import decompose, whitening
from xformopt.passes.factorize.support.sparse_factors import entries_within, fit_factors, place_bits
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program, interpret
from xformopt.program.text import target_name

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
    return [{"ids": torch.randint(0, 80, (8, 9)), "mask": mask} for _ in range(3)]


@pytest.fixture(scope="module")
def vit() -> Program:
    torch.manual_seed(0)
    module = ViT(ViTConfig(image_size=16, in_channels=1, patch=4, width=32, depth=2, heads=2, mlp_ratio=2, classes=10))
    return Pipeline([]).run(xo.capture(module.eval(), {"pixel_values": torch.randn(2, 1, 16, 16)})).program


@pytest.fixture
def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(6, 1, 16, 16, generator=generator)} for _ in range(3)]


def run(name: str, program: Program, batches: list[Batch], **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=batches))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def assert_artifact_agrees(program: Program, batch: Batch, output: str) -> dict[str, int]:
    artifact = lower(program, measure=False)
    found = artifact.run(**{name: value.numpy() for name, value in batch.items()})[output]
    assert distance(program.run(batch)[output], torch.from_numpy(found)) < 1e-5
    return artifact.manifest.execution


def test_whitened_factors_lose_least_of_what_the_layer_answers() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(500, 24, generator=generator, dtype=torch.float64) @ torch.randn(
        24, 24, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(40, 24, generator=generator)
    gram = x.t() @ x
    whitened, plain = decompose(weight, whitening(gram, len(x))), decompose(weight, None)
    w, samples = weight.double().numpy(), x.numpy()
    damping = 1e-3 * float(gram.diagonal().mean()) / len(x)
    for rank in (3, 9, 15):
        gaps = []
        for spectrum in (whitened, plain):
            down, up = spectrum.factors(rank)
            assert down.shape == (rank, 24)
            gaps.append(w - (up @ down).numpy())
        lost = [float(((samples @ gap.T) ** 2).sum()) / len(x) for gap in gaps]
        assert lost[0] + damping * (gaps[0] ** 2).sum() == pytest.approx(whitened.lost(rank), rel=1e-9)
        assert (gaps[1] ** 2).sum() == pytest.approx(plain.lost(rank), rel=1e-9)
        assert lost[0] < lost[1]


@pytest.mark.parametrize("whiten", [True, False])
def test_full_rank_is_exact(whiten: bool, encoder: Program, batches: list[Batch]) -> None:
    result = run("factorize-weights", encoder, batches, rank=1 << 20, even_if_larger=True, whiten=whiten)
    assert len(result.fired) == 10
    wanted, found = encoder.run(batches[0]), result.program.run(batches[0])
    assert max(distance(wanted[name], found[name]) for name in wanted) < 1e-5


@pytest.mark.parametrize("budget", ["flops", "parameters"])
def test_a_budget_is_met(budget: Any, encoder: Program, batches: list[Batch]) -> None:
    step = build_pass("factorize-weights", {"remove": 0.2, "budget": budget})
    result = Pipeline([step]).run(encoder, calibration=batches)
    (record,) = result.history
    removed = 1 - getattr(cost(result.program), budget) / getattr(cost(encoder), budget)
    assert 0.2 <= removed < 0.27
    assert f"{budget}: {removed:.1%} removed" in record.notes
    assert_artifact_agrees(result.program, batches[0], "logits")


def test_sensitivity_is_the_divergence_of_the_changed_program(encoder: Program, batches: list[Batch]) -> None:
    shared = find_candidates(encoder, "factorize-weights", ()).layers["up.w"]
    probe = shared.weight + 0.05 * torch.randn(shared.weight.shape)
    found = measured_loss(encoder, Context(calibration=batches[:2]), [(shared, probe)])["up.w"]
    changed = Program.parse(ENCODER, parameters={**encoder.parameters, "up.w": probe})
    total = 0.0
    for batch in batches[:2]:
        p, q = (torch.softmax(program.run(batch)["logits"].double(), -1) for program in (encoder, changed))
        total += float((p * (p.log() - q.log())).sum(-1).mean()) / 2
    assert found == pytest.approx(total, rel=1e-3)


def test_what_matters_keeps_its_rank(batches: list[Batch]) -> None:
    """A layer whose error nobody sees is cut before one whose error is magnified."""
    parameters = dict(Program.parse(ENCODER).parameters)
    parameters["down.w"] = parameters["down.w"] * 4
    parameters["out.w"] = parameters["out.w"] * 1e-3
    encoder = Program.parse(ENCODER, parameters=parameters)
    result = run("factorize-weights", encoder, batches, remove=0.15).program
    ranks = {name: len(value) for name, value in result.parameters.items() if ".down." in name}
    assert {"gate.w", "value.w", "out.w"} & {name.removesuffix(".down.weight") for name in ranks}
    assert not any(name.startswith("down.w") for name in ranks)


def test_a_latency_budget_is_measured(encoder: Program, batches: list[Batch]) -> None:
    def measure(before: Program, after: Program) -> tuple[float, float]:
        ratio = cost(before).flops / cost(after).flops
        return ratio - 0.01, ratio + 0.01

    step = build_pass("factorize-weights", {"remove": 0.2, "budget": "latency"})
    result = step.run(encoder, Context(calibration=batches, measure=measure)).program
    assert 0.2 <= 1 - cost(result).flops / cost(encoder).flops < 0.27
    with pytest.raises(PassError, match="set budget=flops"):
        step.run(encoder, Context(calibration=batches))
    with pytest.raises(PassError, match=r"90% of the time .* is to go, and with every layer at its smallest rank"):
        build_pass("factorize-weights", {"remove": 0.9, "budget": "latency"}).run(
            encoder, Context(calibration=batches, measure=measure)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rank=0", "a layer of rank 0 answers its bias alone"),
        ("remove=1.0", "between 0 and 1"),
        ("multiple=5", "1, 8, 16 or 32"),
        ("even_if_larger=true", "goes with rank"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(f"factorize-weights{{{options}}}")


def test_refusals(encoder: Program, batches: list[Batch]) -> None:
    with pytest.raises(PassError, match=r"90% of the flops are to go, and with every layer .* \d+\.\d% can"):
        run("factorize-weights", encoder, batches, remove=0.9)
    with pytest.raises(DataError, match="whiten=false, which needs none"):
        run("factorize-weights", encoder, [])
    broken = Program.parse(ENCODER, parameters={**encoder.parameters, "q.w": torch.full((32, 32), torch.nan)})
    with pytest.raises(PassError, match=r"q\.w"):
        run("factorize-weights", broken, batches)


def test_channels_that_the_data_never_excites(encoder: Program, batches: list[Batch]) -> None:
    scale = encoder.parameters["norm2.w"].clone()
    scale[3] = 0
    silent = Program.parse(ENCODER, parameters={**encoder.parameters, "norm2.w": scale})
    (refused,) = [r for r in run("factorize-weights", silent, batches, rank=8).rejected if r.value == "u"]
    assert "never excites 1 of its 32 input channels" in refused.reason


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight that is sparse times dense, and of full rank."""
    generator = torch.Generator().manual_seed(6)
    basis = torch.randn(16, 24, generator=generator)
    places = torch.stack([torch.randperm(16, generator=generator)[:2] for _ in range(120)])
    values = torch.randn(120, 2, generator=generator) + 2
    return torch.zeros(120, 16).scatter(1, places, values) @ basis, basis


def test_sparse_factors_are_found_again() -> None:
    weight, basis = planted()
    near = basis + 0.05 * torch.randn(basis.shape)
    found = fit_factors(weight, None, vectors=16, entries=2, iterations=20, start=near)
    assert found.error < 1e-3 * float(weight.square().sum())
    assert distance(weight, found.weight) < 0.05
    gap = (weight.double() - found.weight).numpy()
    assert found.error == pytest.approx(float((gap**2).sum()), rel=1e-6)


@pytest.mark.parametrize(("size", "vectors"), [(6000, 16), (9999, 100), (300, 16)])
def test_entries_fill_the_bytes(size: int, vectors: int) -> None:
    entries = entries_within(size, 64, 20, vectors, 4)
    bits = place_bits(vectors)

    def taken(count: int) -> int:
        return 4 * vectors * 20 + 64 * (4 * count + int(np.ceil(count * bits / 8)))

    assert entries == 0 or taken(entries) <= size
    assert entries == vectors or taken(entries + 1) > size


def sparse_encoder() -> Program:
    """Give an encoder an FFN whose first weight is sparse times dense."""
    generator = torch.Generator().manual_seed(6)
    basis = torch.randn(32, 32, generator=generator)
    chosen = torch.stack([torch.randperm(32, generator=generator)[:3] for _ in range(48)])
    weight = torch.zeros(48, 32).scatter(1, chosen, torch.ones(48, 3)) @ basis / 10
    return Program.parse(ENCODER, parameters={**Program.parse(ENCODER).parameters, "up.w": weight})


def test_sparse_factors_on_the_target(batches: list[Batch]) -> None:
    step = build_pass("factorize-sparse", {"keep": 0.9})
    encoder = sparse_encoder()
    result = Pipeline([step]).run(encoder, calibration=batches).program
    count = operators(result).count("xf.sparse_factor_linear")
    assert count > 0
    assert result.parameter_bytes < encoder.parameter_bytes
    execution = assert_artifact_agrees(result, batches[0], "logits")
    assert execution["linear layers stored as sparse times dense, computed dense"] == count


@pytest.mark.slow
def test_the_straight_through_factorizer_brings_answers_nearer(batches: list[Batch]) -> None:
    encoder = sparse_encoder()

    def divergence(**options: Any) -> float:
        changed = run("factorize-sparse", encoder, batches, keep=0.8, **options).program
        total = 0.0
        for batch in batches:
            p, q = (torch.log_softmax(program.run(batch)["logits"].double(), -1) for program in (encoder, changed))
            total += float((p.exp() * (p - q)).sum(-1).mean())
        return total

    assert divergence(iterations=40) < divergence()


def test_projected_keys_begin_as_averages(vit: Program, images: list[Batch]) -> None:
    result = run("project-keys", vit, images, keys=4, iterations=0).program
    attention = next(node for node in result.nodes() if target_name(node.target) == "xf.attention")
    seen: dict[str, torch.Tensor] = {}
    interpret(result, images[0], observe=lambda node, value: seen.update({node.name: value}))
    product = attention.args[1]
    assert isinstance(product, fx.Node)
    keys = product.args[1]
    assert isinstance(keys, fx.Node)
    mixed, whole = seen[product.name], seen[keys.name]
    groups = [[p for p in range(17) if p * 4 // 17 == key] for key in range(4)]
    wanted = torch.stack([whole[:, group].mean(1) for group in groups], 1)
    assert torch.allclose(mixed, wanted, atol=1e-5)


def test_trained_projections(vit: Program, images: list[Batch]) -> None:
    drifts = []
    for iterations in (0, 40):
        step = build_pass("project-keys", {"keys": 4, "iterations": iterations})
        result = Pipeline([step]).run(vit, calibration=images)
        drifts.append(distance(vit.run(images[0])["logits"], result.program.run(images[0])["logits"]))
    assert drifts[1] < drifts[0]
    assert cost(result.program).flops < cost(vit).flops
    assert_artifact_agrees(result.program, images[1], "logits")


def test_greenformers_choose_by_length(vit: Program, images: list[Batch]) -> None:
    long = run("apply-greenformers", vit, images, long=16, keys=4, iterations=1)
    assert "aten.matmul" in operators(long.program)
    assert long.notes[0] == "projected keys: 17 keys are many"
    short = run("apply-greenformers", vit, images, remove=0.1)
    assert operators(short.program).count("xf.linear") > operators(vit).count("xf.linear")
    assert short.notes[0] == "low-rank weights: 17 keys are few"
    small = run("apply-greenformers", vit, images, long=16, budget="parameters", remove=0.1)
    assert "aten.matmul" not in operators(small.program)


def test_greenformers_fall_back_where_lengths_vary(encoder: Program, batches: list[Batch]) -> None:
    result = run("apply-greenformers", encoder, batches, long=1, keys=1, remove=0.1)
    assert "low-rank weights, though" in result.notes[0]
    assert any("masked" in refusal.reason for refusal in result.rejected)
