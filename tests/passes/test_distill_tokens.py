"""Informer's distilling behind layers of an encoder: the formula by hand, the budget, recovery's start, the target."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xformopt.analysis import cost
from xformopt.capture.exporter import capture_module
from xformopt.errors import PassError, UsageError
from xformopt.lowering import lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass
from xformopt.passes.recover.support.trainable import parts_of
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program

PREFIX = 1


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=16, in_channels=1, patch=4, width=32, depth=3, heads=2)).eval()


@pytest.fixture(scope="module")
def captured(vit: ViT) -> Program:
    return Pipeline().run(capture_module(vit, images(2), dynamic={"pixel_values": {0: "batch"}})).program


def images(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))}


def run(program: Program, **options: Any) -> PassResult:
    return build_pass("distill-tokens", options).run(program, Context())


def halved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One image's tokens ``[T, C]``, token by token."""
    tokens = x[PREFIX:]
    count = len(tokens)
    mixed = []
    for i in range(count):
        total = bias + sum(tokens[(i + step - 1) % count] @ weight[:, :, step].t() for step in range(3))
        mixed.append(torch.where(total > 0, total, total.exp() - 1))
    pooled = [torch.stack(mixed[max(i - 1, 0) : i + 2]).amax(0) for i in range(0, count, 2)]
    return torch.cat([x[:PREFIX], torch.stack(pooled)])


def test_it_is_the_formula_and_runs_on_the_target(vit: ViT, captured: Program) -> None:
    result = run(captured, layers=(0, 1))
    generator = torch.Generator().manual_seed(4)
    own = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if "distilling" in name else value
        for name, value in result.program.parameters.items()
    }
    program = result.program.copy()
    program.parameters = own
    weights = [name.removesuffix(".weight") for name in own if name.endswith("distilling.weight")]
    assert len(weights) == 2
    given = images(2)
    expected = []
    with torch.no_grad():
        for image in given["pixel_values"]:
            x = torch.cat([vit.prefix, vit.embedding(image[None])], 1) + vit.positions  # type: ignore[list-item]
            for place, block in enumerate(vit.backbone.blocks):
                x = x + block.mixer(block.mixer_norm(x))
                if place < 2:
                    x = halved(x[0], *(own[f"{weights[place]}.{part}"] for part in ("weight", "bias")))[None]
                x = x + block.mlp(block.mlp_norm(x))
            expected.append(vit.head(vit.backbone.norm(x)[:, 0])[0])
    torch.testing.assert_close(program.run(given)["logits"], torch.stack(expected), rtol=1e-4, atol=1e-4)
    artifact = lower(program, measure=False)
    found = torch.from_numpy(artifact.run(pixel_values=given["pixel_values"].numpy())["logits"])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_as_few_halvings_as_the_budget_needs(captured: Program) -> None:
    once, twice = run(captured, fewer_flops=0.05), run(captured, fewer_flops=0.25)
    assert [len(result.fired) for result in (once, twice)] == [1, 3]
    assert cost(twice.program).flops < 0.75 * cost(captured).flops < cost(captured).flops
    assert "leave" in once.notes[0]
    with pytest.raises(PassError, match="cannot save 90%"):
        run(captured, fewer_flops=0.9)


def test_recovery_trains_the_convolution(captured: Program) -> None:
    trainable, _ = parts_of(run(captured, layers=(0,)).program)
    assert sum("distilling" in name for name in trainable) == 2


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="half of the tokens leave, so that r cannot be 3"):
        build_pass("distill-tokens", {"r": 3})
