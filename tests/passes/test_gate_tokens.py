"""Token gates on captured models and in artifacts: exact where all pass, and what the paper says where few do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.analysis import cost
from xformopt.capture.exporter import capture_module
from xformopt.lowering import load, lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program

TOKENS, WIDTH, DEPTH = 17, 32, 2


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def vit() -> ViT:
    torch.manual_seed(0)
    module = ViT(ViTConfig(image_size=16, in_channels=1, patch=4, width=WIDTH, depth=DEPTH, heads=2)).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.fixture(scope="module")
def captured(vit: ViT) -> Program:
    return Pipeline().run(capture_module(vit, frames(1)[0], dynamic={"pixel_values": {0: "batch"}})).program


@pytest.fixture(scope="module")
def gated(captured: Program) -> Program:
    result = Pipeline([build_pass("gate-tokens", {})]).run(captured, calibration=frames(1))
    (record,) = result.history
    # verified with its defaults, which let all tokens pass
    assert (record.changed, record.fired) == (True, 3 * DEPTH)
    assert record.drift < 1e-5
    return result.program


def frames(count: int) -> list[dict[str, torch.Tensor]]:
    """Return a video of two images: the same but for one patch, which brightens from frame to frame."""
    first = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    brighter = torch.zeros(2, 1, 16, 16)
    brighter[:, :, 4:8, 8:12] = 1.0
    return [{"pixel_values": first + 0.2 * number * brighter} for number in range(count)]


def state_of(outputs: dict[str, Any]) -> dict[str, Any]:
    return {f"past_{name[8:]}": value for name, value in outputs.items() if name.startswith("present_")}


def by_hand(module: ViT, video: list[torch.Tensor], r: int) -> list[torch.Tensor]:
    """Eventful transformers with gates behind norms, one image and one token at a time."""
    references: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    answers = []

    def gate(name: str, x: torch.Tensor, layers: list[Any]) -> list[torch.Tensor]:
        if name not in references:
            references[name], passing = x.clone(), list(range(len(x)))
            for place, layer in enumerate(layers):
                buffers[f"{name}{place}"] = layer(x)
        else:
            error = (x - references[name]).norm(dim=1).tolist()
            passing = sorted(range(len(x)), key=lambda token: -error[token])[:r]
        for token in passing:
            references[name][token] = x[token]
            for place, layer in enumerate(layers):
                buffers[f"{name}{place}"][token] = layer(x[token])
        return [buffers[f"{name}{place}"] for place in range(len(layers))]

    for image in video:
        x = torch.cat([module.prefix, module.embedding(image[None])], 1)[0] + module.positions[0]  # type: ignore[list-item]
        for number, block in enumerate(module.backbone.blocks):
            mixer = block.mixer
            qkv = gate(f"{number}qkv", block.mixer_norm(x), [mixer.query, mixer.key, mixer.value])
            q, k, v = (part.unflatten(1, (2, -1)).transpose(0, 1) for part in qkv)
            mixed = (((q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + gate(f"{number}out", mixed, [mixer.output])[0]
            x = x + gate(f"{number}mlp", block.mlp_norm(x), [block.mlp])[0]
        answers.append(module.head(module.backbone.norm(x)[0]))
    return answers


def test_the_artifact_is_exact_where_all_tokens_pass(captured: Program, gated: Program, tmp_path: Any) -> None:
    lower(gated, measure=False).save(tmp_path / "gated")
    artifact = load(tmp_path / "gated")
    state: dict[str, np.ndarray] = {}
    for number, frame in enumerate(frames(4)):
        # the first frame, and one later, leave the ranks out
        ranks = {} if number in (0, 2) else {"ranks": np.arange(TOKENS)}
        found = artifact.run(pixel_values=frame["pixel_values"].numpy(), **ranks, **state)
        want = captured.run(frame)["logits"].numpy()
        np.testing.assert_allclose(found["logits"], want, rtol=1e-5, atol=1e-5)
        state = state_of(found)
    assert {spec.default for spec in artifact.manifest.inputs} == {None, "zeros", "ascending"}


@pytest.mark.parametrize("r", [1, 5])
def test_few_tokens_are_recomputed_as_the_paper_says(r: int, vit: ViT, gated: Program) -> None:
    artifact = lower(gated, measure=False)
    video = frames(4)
    wanted = [by_hand(vit, [frame["pixel_values"][row] for frame in video], r) for row in range(2)]
    state: dict[str, np.ndarray] = {}
    for number, frame in enumerate(video):
        ranks = {"ranks": np.arange(r)} if number else {}
        found = artifact.run(pixel_values=frame["pixel_values"].numpy(), **ranks, **state)
        for row in range(2):
            np.testing.assert_allclose(found["logits"][row], wanted[row][number].numpy(), rtol=1e-4, atol=1e-4)
        state = state_of(found)


def test_a_frame_that_does_not_change_costs_one_token_and_nothing_else(captured: Program, gated: Program) -> None:
    frame = frames(1)[0]
    first = gated.run(frame)
    again = gated.run({**frame, "ranks": torch.arange(1), **state_of(first)})
    torch.testing.assert_close(again["logits"], captured.run(frame)["logits"], rtol=1e-5, atol=1e-5)


def test_the_work_falls_with_the_tokens(captured: Program, gated: Program) -> None:
    def linear(program: Program, sizes: dict[str, int] | None = None) -> int:
        return sum(node.flops for node in cost(program, sizes).by_node if node.operator == "xf.linear")

    whole = linear(captured)
    head = 2 * 2 * WIDTH * 10
    for r in (1, 5, TOKENS):
        assert linear(gated, {"recomputed": r}) == (whole - head) * r // TOKENS + head
    # the gates themselves: three operations an element, of which two gates a block look at the width
    gates = sum(node.flops for node in cost(gated).by_node if node.operator == "xf.changed_tokens")
    assert gates == 3 * 2 * TOKENS * WIDTH * 3 * DEPTH


def test_the_exact_recipe_may_follow(captured: Program, gated: Program) -> None:
    from xformopt.pipeline.recipes import load_recipe

    program = Pipeline(load_recipe("exact")).run(gated).program
    video = frames(2)
    state = state_of(program.run(video[0]))
    found = program.run({**video[1], "ranks": torch.arange(3), **state})["logits"]
    state = state_of(gated.run(video[0]))
    want = gated.run({**video[1], "ranks": torch.arange(3), **state})["logits"]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_its_text_reads_back(gated: Program) -> None:
    again = Program.parse(str(gated), parameters=gated.parameters)
    assert again.inputs == gated.inputs
    assert again.fingerprint == gated.fingerprint


def test_the_input_is_left_alone(captured: Program) -> None:
    before = (str(captured), captured.dims.names)
    result = build_pass("gate-tokens", {}).run(captured, Context())
    assert (str(captured), captured.dims.names) == before
    assert "recomputed" in result.program.dims
    assert "6 gates" in result.notes[0]
    # a reference a gate, and five buffers a block, four bytes each
    buffers = DEPTH * (3 * WIDTH + 5 * WIDTH) * TOKENS * 4
    assert f"{buffers:,} bytes of state" in result.notes[0]
