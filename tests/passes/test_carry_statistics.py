"""Statistics carried between denoising steps: exact where nothing moves, better than the mask alone where it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xformopt.capture.exporter import capture_module
from xformopt.errors import DataError, UsageError
from xformopt.lowering import lower
from xformopt.models.dit import Dit, DitConfig
from xformopt.passes import build_pass
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program

Batch = dict[str, torch.Tensor]
OPTIONS = {"keep": 0.3, "block": 4}
STEPS = (900.0, 899.5, 899.0, 898.5)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def denoiser() -> Program:
    torch.manual_seed(0)
    module = Dit(DitConfig(image_size=8, width=32, depth=2, heads=2)).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.1)
    inputs = module.example_inputs()
    return Pipeline().run(capture_module(module, inputs, dynamic={name: {0: "batch"} for name in inputs})).program


def at(step: float, latent: torch.Tensor | None = None) -> Batch:
    if latent is None:
        latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"latent": latent, "timestep": torch.full((2,), step), "label": torch.tensor([1, 7])}


def made(program: Program, step: str, **options: Any) -> Program:
    context = Context(calibration=tuple(at(step) for step in STEPS))
    result = build_pass("carry-statistics", {**OPTIONS, "step": step, **options}).run(program, context)
    assert len(result.fired) == 2
    return result.program


def carried(outputs: Batch) -> Batch:
    return {f"past_{name[8:]}": value for name, value in outputs.items() if name.startswith("present_")}


@pytest.mark.parametrize("reshape", [True, False])
def test_nothing_is_lost_while_nothing_moves(denoiser: Program, reshape: bool) -> None:
    exact = denoiser.run(at(900.0))["noise"]
    full = made(denoiser, "full", reshape=reshape).run(at(900.0))
    torch.testing.assert_close(full["noise"], exact, rtol=1e-4, atol=1e-5)
    again = made(denoiser, "sparse", reshape=reshape).run({**at(900.0), **carried(full)})
    torch.testing.assert_close(again["noise"], exact, rtol=1e-4, atol=1e-5)


def test_without_statistics_it_is_the_mask_alone(denoiser: Program) -> None:
    context = Context(calibration=tuple(at(step) for step in STEPS))
    masked = build_pass("mask-attention", {**OPTIONS, "score": "mass"}).run(denoiser, context).program
    found = made(denoiser, "sparse").run(at(850.0))["noise"]
    torch.testing.assert_close(found, masked.run(at(850.0))["noise"], rtol=1e-4, atol=1e-5)


def test_the_share_of_what_is_left_grows(denoiser: Program) -> None:
    state = carried(made(denoiser, "full").run(at(900.0)))
    later = made(denoiser, "sparse", growth=0.25).run({**at(900.0), **state})
    for number in range(2):
        before = state[f"past_hidden_{number}"]
        assert before.shape == (2, 16, 2)
        assert 0 < float(before.min()) < float(before.max()) < 1
        torch.testing.assert_close(later[f"present_hidden_{number}"], (before - 0.25).clamp(min=0))


def denoised(run: Callable[[int, Batch], torch.Tensor]) -> torch.Tensor:
    latent = at(0.0)["latent"]
    for number, step in enumerate(STEPS):
        latent = latent - 0.1 * run(number, at(step, latent))[:, :4]
    return latent


def test_denoising_by_artifacts_is_closer_than_by_the_mask_alone(denoiser: Program) -> None:
    full, sparse = (lower(made(denoiser, step), measure=False) for step in ("full", "sparse"))
    state: Batch = {}

    def step(number: int, given: Batch) -> torch.Tensor:
        artifact, kept = (full, {}) if number == 0 else (sparse, state)
        outputs = artifact.run(**{name: value.numpy() for name, value in {**given, **kept}.items()})
        found = {name: torch.from_numpy(value) for name, value in outputs.items()}
        state.update(carried(found))
        return found["noise"]

    alone = made(denoiser, "sparse")
    exact = denoised(lambda _, given: denoiser.run(given)["noise"])
    masked = denoised(lambda number, given: (alone if number else denoiser).run(given)["noise"])
    found = denoised(step)
    errors = [float((x - exact).norm()) for x in (found, masked)]
    assert 0 < errors[0] < 0.5 * errors[1], errors


def test_statistics_need_data_and_options_that_make_sense(denoiser: Program) -> None:
    with pytest.raises(DataError, match="there is none"):
        build_pass("carry-statistics", OPTIONS).run(denoiser, Context())
    for options, message in (
        ({"keep": 0.0}, "keep must lie between 0 and 1"),
        ({"block": 0}, "block must be at least 1"),
        ({"growth": 1.0}, "growth must be at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            build_pass("carry-statistics", options)
