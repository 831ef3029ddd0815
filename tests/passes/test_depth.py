"""Passes on depth, against modules that compute the same by hand, and the artifacts of what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import torch
from torch import nn

import xformopt as xo
from xformopt.analysis import cost
from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass
from xformopt.passes.depth.fuse_layers import FusedWeight
from xformopt.passes.depth.support.layers import find_layers
from xformopt.passes.depth.support.macro_influence import macro_influence
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program
from xformopt.program.text import target_name

Batch = dict[str, torch.Tensor]
WIDTH, DEPTH = 16, 4


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def vit(**changes: Any) -> ViT:
    """Build a small ViT whose weights, biases and norms all matter."""
    config = {"image_size": 8, "patch": 4, "width": WIDTH, "depth": DEPTH, "heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ViT(ViTConfig(**{**config, **changes})).eval().requires_grad_(False)  # type: ignore[arg-type]
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.15)
    return module


def lifted(module: ViT) -> Program:
    return Pipeline([]).run(xo.capture(module, module.example_inputs())).program


@pytest.fixture(scope="module")
def plain() -> tuple[ViT, Program]:
    module = vit()
    return module, lifted(module)


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(6, 3, 8, 8, generator=generator)} for _ in range(3)]


def run(name: str, program: Program, batches: list[Batch], **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=batches))


def logits(model: Program | nn.Module, batch: Batch) -> torch.Tensor:
    answer = model.run(batch) if isinstance(model, Program) else model(**batch)
    return answer["logits"]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def assert_artifact_agrees(program: Program, batch: Batch) -> None:
    artifact = lower(program, measure=False)
    found = artifact.run(**{name: value.numpy() for name, value in batch.items()})["logits"]
    assert distance(logits(program, batch), torch.from_numpy(found)) < 1e-5


def test_parallel_branches_become_wider_ones(batches: list[Batch]) -> None:
    module = vit(branches=2, depth=2)
    program = lifted(module)
    result = Pipeline([build_pass("merge-branches", {})]).run(program, calibration=batches)
    assert result.history[0].fired == 4
    assert result.history[0].local_l2 < 1e-6
    attentions = [node for node in result.program.nodes() if target_name(node.target) == "xf.attention"]
    assert [node.kwargs["heads"] for node in attentions] == [4, 4]
    # queries, keys, values, output, two layers of the FFN, each once in a block; and the classifier
    assert operators(result.program).count("xf.linear") == 2 * 6 + 1
    assert operators(result.program).count("xf.layer_norm") == 2 * 2 + 1
    # only norms and sums are saved
    assert 0.9 < cost(result.program).flops / cost(program).flops < 1
    assert distance(logits(module, batches[0]), logits(result.program, batches[0])) < 1e-5
    assert_artifact_agrees(result.program, batches[0])


def summed(joined: ViT, plain: ViT) -> ViT:
    """Fill a sequential ViT of the same depth with the sums of the weights of a joined one's branches."""
    state = {name: value for name, value in joined.state_dict().items() if not name.startswith("backbone.blocks")}
    for index, block in enumerate(joined.backbone.blocks):
        parts = {"mixer": block.attention, "mlp": block.mlp}
        for part, norm in (("mixer", block.attention_norm), ("mlp", block.mlp_norm)):
            stem = f"backbone.blocks.{index}.{part}"
            state |= {f"{stem}_norm.{name}": value for name, value in norm.state_dict().items()}
            for name, branches in parts[part].named_children():
                for kind in ("weight", "bias"):
                    state[f"{stem}.{name}.{kind}"] = torch.stack([getattr(b, kind) for b in branches]).sum(0)
    plain.load_state_dict(state)
    return plain


@pytest.mark.slow
def test_joined_branches_become_a_model_of_fewer_layers(batches: list[Batch]) -> None:
    module = vit(branches=3, depth=2, joined=True)
    program = lifted(module)
    result = Pipeline([build_pass("merge-branches", {})]).run(program, calibration=batches)
    by_hand = summed(module, vit(depth=2))
    assert distance(logits(module, batches[0]), logits(by_hand, batches[0])) < 1e-5
    assert distance(logits(module, batches[0]), logits(result.program, batches[0])) < 1e-5
    small = cost(lifted(by_hand))
    assert (cost(result.program).flops, cost(result.program).parameters) == (small.flops, small.parameters)
    assert cost(program).parameters > 2 * small.parameters
    assert_artifact_agrees(result.program, batches[0])


def test_branches_are_joined_in_proportion(batches: list[Batch]) -> None:
    from xformopt.models.joined import join_branches

    module = vit(branches=3, depth=1, joined=True)
    mlp, x = module.backbone.blocks[0].mlp, torch.randn(2, 5, WIDTH)
    hidden = [widen(x) for widen in mlp.widen]
    for share in (0.0, 0.3, 1.0):
        join_branches(module, share)
        seen = [(1 - share) * u + share * torch.stack(hidden).sum(0) for u in hidden]
        wanted = sum(narrow(nn.functional.gelu(u)) for narrow, u in zip(mlp.narrow, seen, strict=True))
        assert distance(wanted, mlp(x)) < 1e-6
    assert logits(module, batches[0]).isfinite().all()


def test_macro_influence_by_hand(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    module, program = plain
    layers = find_layers(program)
    assert [layer.name for layer in layers] == [f"backbone.blocks.{index}" for index in range(DEPTH)]
    found = macro_influence(program, layers, batches)
    hidden: list[torch.Tensor] = []
    handle = module.backbone.norm.register_forward_hook(lambda m, given, result: hidden.append(result))
    blocks = list(module.backbone.blocks)
    try:
        for kept in [blocks, *([b for b in blocks if b is not gone] for gone in blocks)]:
            module.backbone.blocks = nn.ModuleList(kept)
            for batch in batches:
                module(**batch)
    finally:
        handle.remove()
        module.backbone.blocks = nn.ModuleList(blocks)
    whole, *without = hidden[: len(batches)], hidden[len(batches) :]
    for index, layer in enumerate(layers):
        part = without[0][index * len(batches) : (index + 1) * len(batches)]
        cosines = [torch.cosine_similarity(a.double(), b.double(), -1).mean() for a, b in zip(whole, part, strict=True)]
        assert found[layer] == pytest.approx(1 - float(torch.stack(cosines).mean()), rel=1e-6)


@pytest.mark.slow
def test_the_layer_of_least_influence_goes(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    influence = macro_influence(program, find_layers(program), batches)
    index = min(range(DEPTH), key=list(influence.values()).__getitem__)
    result = Pipeline([build_pass("remove-layers", {})]).run(program, calibration=batches)
    assert f"removed: backbone.blocks.{index} (Macro Influence" in result.history[0].notes[0]
    shorter = vit()
    del shorter.backbone.blocks[index]
    assert distance(logits(shorter, batches[0]), logits(result.program, batches[0])) < 1e-6
    assert_artifact_agrees(result.program, batches[0])
    assert len(find_layers(run("remove-layers", program, batches, layers=3).program)) == 1


def test_layers_that_have_to_stay(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    for name in ("remove-layers", "fuse-layers"):
        with pytest.raises(PassError, match=r"has 4, of which one stays\. At best, 3 go"):
            run(name, program, batches, layers=4)
        with pytest.raises(DataError, match="What a layer is worth is measured on calibration data"):
            run(name, program, [])
        with pytest.raises(UsageError, match="layers must be at least 1"):
            build_pass(name, {"layers": 0})
    with pytest.raises(PassError, match=r"0 are gone, and the least of the rest, backbone\.blocks\.\d, has"):
        run("remove-layers", program, batches, most=1e-9)
    for name in ("fuse-layers", "share-layers"):
        with pytest.raises(UsageError, match="rank must be at least 1, but is 0"):
            build_pass(name, {"rank": 0})


def test_a_fused_weight_takes_over_part_of_the_removed_one() -> None:
    start, removed = torch.randn(5, 7), torch.randn(5, 7)
    variable = FusedWeight(start, removed, 2, seed=0)
    assert torch.equal(variable.value(), start)
    assert torch.equal(variable.untrained(), start)
    with torch.no_grad():
        variable.leaf.copy_(torch.randn(variable.leaf.shape))
    left, right = variable.leaf.detach()[:20].view(5, 4), variable.leaf.detach()[20:].view(4, 7)
    c, b, d, a = left[:, :2], left[:, 2:], right[:2], right[2:]
    wanted = start + (c @ d) * removed + b @ a * start.std()
    assert distance(wanted, variable.result()) < 1e-6


@pytest.mark.slow
def test_fused_layers_do_more_than_the_rest_alone(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    removed = run("remove-layers", program, batches).program
    result = Pipeline([build_pass("fuse-layers", {"iterations": 60, "rank": 4})]).run(program, calibration=batches)
    (record,) = result.history
    assert "1 blocks reconstructed" in record.notes[0]
    # no operator and no byte more than without the layer
    assert operators(result.program) == operators(removed)
    assert cost(result.program).parameter_bytes == cost(removed).parameter_bytes
    errors = {
        kind: sum(distance(logits(program, batch), logits(model, batch)) for batch in batches)
        for kind, model in (("fused", result.program), ("removed", removed))
    }
    assert errors["fused"] < 0.9 * errors["removed"]
    assert_artifact_agrees(result.program, batches[0])


class SideBySide(nn.Module):
    """Two blocks side by side."""

    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = (self.one, self.two)
        x = x + sum(block.mixer(block.mixer_norm(x)) for block in pair)
        return x + sum(block.mlp(block.mlp_norm(x)) for block in pair)


def test_layers_side_by_side(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    wide = vit()
    a, b, c, d = wide.backbone.blocks
    wide.backbone.blocks = nn.ModuleList([SideBySide(a, b), SideBySide(c, d)])
    apart = run("parallelize-layers", program, batches, merge=False)
    merged = Pipeline([build_pass("parallelize-layers", {})]).run(program, calibration=batches)
    for found in (apart.program, merged.program):
        assert distance(logits(wide, batches[0]), logits(found, batches[0])) < 1e-5
    assert operators(apart.program).count("xf.attention") == DEPTH
    assert operators(merged.program).count("xf.attention") == DEPTH // 2
    notes = merged.history[0].notes
    assert any(note.startswith("side by side: backbone.blocks.0 and backbone.blocks.1") for note in notes)
    assert "4 sums of branches merged" in notes
    assert notes[-1] == "speed-up: not measured in this run, which times nothing"
    assert_artifact_agrees(merged.program, batches[0])


@pytest.mark.slow
def test_what_layers_side_by_side_gain_is_measured(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    step = build_pass("parallelize-layers", {"pairs": 1})
    for interval, wanted in (((0.97, 1.04), "no difference (measured 0.97 to 1.04)"), ((1.2, 1.4), "1.30 (measured")):
        context = Context(calibration=batches, measure=lambda before, after, interval=interval: interval)
        assert wanted in step.run(program, context).notes[-1]
    with pytest.raises(PassError, match="at best, 2 pairs do"):
        run("parallelize-layers", program, batches, pairs=3)


@pytest.mark.parametrize("start", ["stepwise", "average", "lower"])
def test_shared_layers_are_exact_at_full_rank(start: str, plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    result = run("share-layers", program, [], rank=WIDTH * 2, layers=2, start=start, iterations=0)
    assert distance(logits(program, batches[0]), logits(result.program, batches[0])) < 1e-5
    assert "no bytes saved: take a smaller rank" in result.notes[0]


@pytest.mark.slow
def test_the_shared_weight_is_stored_once(plain: tuple[ViT, Program], batches: list[Batch], tmp_path: Path) -> None:
    _, program = plain
    result = Pipeline([build_pass("share-layers", {"rank": 1, "iterations": 40})]).run(program, calibration=batches)
    assert_artifact_agrees(result.program, batches[0])
    sizes = {}
    for name, found in (("before", program), ("after", result.program)):
        lower(found, measure=False).save(tmp_path / name)
        tensors = onnx.load(tmp_path / name / "model.onnx").graph.initializer
        shapes = [tuple(sorted(tensor.dims)) for tensor in tensors]
        # the two matrices of the FFN
        assert shapes.count((WIDTH, 2 * WIDTH)) == (2 if name == "after" else 2 * DEPTH)
        sizes[name] = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)
    assert sizes["after"] < 0.6 * sizes["before"]
    # a loop saves no operations
    assert cost(result.program).flops > cost(program).flops
    assert "since a loop runs every layer" in result.history[0].notes[0]


@pytest.mark.slow
def test_training_brings_shared_layers_nearer(plain: tuple[ViT, Program], batches: list[Batch]) -> None:
    _, program = plain
    found = [run("share-layers", program, batches, rank=2, iterations=steps).program for steps in (0, 60)]
    errors = [sum(distance(logits(program, batch), logits(one, batch)) for batch in batches) for one in found]
    assert errors[1] < errors[0]
    with pytest.raises(PassError, match=r"cannot be a loop of 3\. Set layers to 1 or 2"):
        run("share-layers", program, batches, layers=3)
