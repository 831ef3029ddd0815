"""Passes that make tokens fewer, on captured models: against ToMe written out, on the target, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from xformopt.analysis import cost
from xformopt.capture.exporter import capture_module
from xformopt.errors import DataError, PassError, UsageError
from xformopt.kernels.patch_embedding.resize import resize_kernel, resize_matrix
from xformopt.lowering import lower
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program

TEXT = """
program "encoder" lifted
dim batch in [1, inf]
{dim}input %x: f32[batch,{length},32]
input %mask: i64[batch,{length}]
param %q.w: f32[32,32]
param %k.w: f32[32,32]
param %o.w: f32[32,32]
param %norm.w: f32[32]
param %norm.b: f32[32]
param %up.w: f32[32,32]
%keep: bool[batch,{length}] = aten.ne.Scalar(%mask) {{other=0}}
%q: f32[batch,{length},32] = xf.linear(%x, %q.w)
%k: f32[batch,{length},32] = xf.linear(%x, %k.w)
%a: f32[batch,{length},32] = xf.attention(%q, %k, %x, %keep) {{heads=4, kv_heads=4, scale=0.35}}
%o: f32[batch,{length},32] = xf.linear(%a, %o.w)
%s: f32[batch,{length},32] = aten.add.Tensor(%o, %x)
%n: f32[batch,{length},32] = xf.layer_norm(%s, %norm.w, %norm.b) {{eps=1e-05}}
%u: f32[batch,{length},32] = xf.linear(%n, %up.w)
%t: f32[batch,{length},32] = aten.add.Tensor(%u, %n)
%a2: f32[batch,{length},32] = xf.attention(%t, %t, %t, %keep) {{heads=4, kv_heads=4, scale=0.35}}
%t2: f32[batch,{length},32] = aten.add.Tensor(%a2, %t)
%pooled: f32[batch,32] = xf.mean_pool(%t2, %mask) {{eps=1e-09}}
return hidden=%t2 valid keep %mask, pooled=%pooled
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def vit() -> ViT:
    torch.manual_seed(0)
    module = ViT(ViTConfig(image_size=16, in_channels=1, patch=4, width=32, depth=3, heads=2)).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.fixture(scope="module")
def captured(vit: ViT) -> Program:
    return Pipeline().run(capture_module(vit, images(2), dynamic={"pixel_values": {0: "batch"}})).program


def images(count: int, side: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(count))}


def run(name: str, program: Program, **options: Any) -> PassResult:
    calibration = [images(4)] if name == "slim-patches" else []
    return build_pass(name, options).run(program, Context(calibration=calibration))


def merged_by_hand(module: ViT, image: torch.Tensor, r: int) -> torch.Tensor:
    """ToMe on one image, token by token, in the arithmetic of the module."""
    x = torch.cat([module.prefix, module.embedding(image)], 1)[0] + module.positions[0]  # type: ignore[list-item]
    sizes = torch.ones(len(x))
    for block in module.backbone.blocks:
        mixer, normed = block.mixer, block.mixer_norm(x)
        q, k, v = (
            layer(normed).unflatten(1, (2, -1)).transpose(0, 1) for layer in (mixer.query, mixer.key, mixer.value)
        )
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + sizes.log()).softmax(-1)
        x = x + mixer.output((weights @ v).transpose(0, 1).flatten(1))
        keys = k.mean(0)
        first, second = list(range(1, len(x), 2)), list(range(2, len(x), 2))
        alike = functional.cosine_similarity(keys[first, None], keys[None, second], dim=-1)
        best = sorted(range(len(first)), key=lambda i: -float(alike[i].max()))[:r]
        groups = {token: [token] for token in range(len(x))}
        for i in best:
            groups[second[int(alike[i].argmax())]] += groups.pop(first[i])
        # behind the first of several merges the order decides who is in which set: that of the pass
        rest = [first[i] for i in sorted(range(len(first)), key=lambda i: -float(alike[i].max()))[r:]]
        order = [0, *rest, *second]
        shares = [sizes[groups[t]] / sizes[groups[t]].sum() for t in order]
        x = torch.stack([(x[groups[t]] * share[:, None]).sum(0) for t, share in zip(order, shares, strict=True)])
        sizes = torch.stack([sizes[groups[t]].sum() for t in order])
        x = x + block.mlp(block.mlp_norm(x))
    return module.head(module.backbone.norm(x)[0])


def test_merging_is_tome(vit: ViT, captured: Program) -> None:
    result = run("merge-tokens", captured, r=3)
    assert len(result.fired) == 3
    inputs = images(2)
    found = result.program.run(inputs)["logits"]
    for row in range(2):
        torch.testing.assert_close(found[row], merged_by_hand(vit, inputs["pixel_values"][row : row + 1], 3))


PASSES: list[tuple[str, dict[str, Any]]] = [
    ("merge-tokens", {"fewer_flops": 0.3}),
    ("merge-tokens", {"r": 2, "proportional": False}),
    ("prune-tokens", {"fewer_flops": 0.3}),
    ("prune-tokens", {"r": 2, "by": "class"}),
    ("transform-tokens", {"r": 3, "layers": (0, 1)}),
    ("slim-patches", {"r": 4}),
    ("resize-patches", {"patch": 8}),
]


@pytest.mark.parametrize(("name", "options"), PASSES)
def test_the_artifact_computes_the_program(name: str, options: dict[str, Any], captured: Program) -> None:
    result = run(name, captured, **options)
    assert result.changed
    if "fewer_flops" in options:
        assert 0.3 <= 1 - cost(result.program).flops / cost(captured).flops < 0.4
    artifact = lower(result.program, measure=False)
    for batch in (1, 3):
        inputs = images(batch)
        expected = result.program.run(inputs)["logits"]
        found = torch.from_numpy(artifact.run(pixel_values=inputs["pixel_values"].numpy())["logits"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["merge-tokens", "prune-tokens", "transform-tokens", "slim-patches"])
def test_no_token_leaves_when_none_is_to(name: str, captured: Program) -> None:
    result = run(name, captured, r=0)
    assert not result.changed
    assert result.program is captured
    assert "nothing was changed" in result.notes[0]


def test_passes_run_behind_the_exact_recipe(captured: Program) -> None:
    from xformopt.pipeline.recipes import load_recipe

    result = Pipeline([*load_recipe("exact"), build_pass("merge-tokens", {"r": 3})]).run(captured)
    assert result.history[-1].changed
    fused = [str(node.target) for node in result.program.nodes() if "add_layer_norm" in str(node.target)]
    assert len(fused) == 3, "the norms behind merges read no sum, the others do"
    torch.testing.assert_close(
        result.program.run(images(2))["logits"],
        run("merge-tokens", captured, r=3).program.run(images(2))["logits"],
        rtol=1e-4,
        atol=1e-4,
    )


def padded(length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 9:], mask[1, :6] = 0, 0
    return {"x": torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1)), "mask": mask}


def test_padding_is_merged_without_loss() -> None:
    program = Program.parse(TEXT.format(dim="", length=16))
    inputs = padded(16)
    result = run("merge-tokens", program, r=3, layers=(0,))
    before, after = program.run(inputs), result.program.run(inputs)
    real = inputs["mask"].bool()
    torch.testing.assert_close(after["hidden"][real], before["hidden"][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["pooled"], before["pooled"], rtol=1e-4, atol=1e-5)
    found = lower(result.program, measure=False).run(**{name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found["pooled"]), before["pooled"], rtol=1e-4, atol=1e-5)


def test_masks_that_are_computed_twice_are_one() -> None:
    again = "%keep2: bool[batch,{length}] = aten.ne.Scalar(%mask) {{other=0}}\n%a2:"
    text = TEXT.replace("%a2:", again, 1).replace("(%t, %t, %t, %keep)", "(%t, %t, %t, %keep2)")
    program, once = (Program.parse(each.format(dim="", length=16)) for each in (text, TEXT))
    found = run("merge-tokens", program, r=3).program.run(padded(16))["pooled"]
    torch.testing.assert_close(found, run("merge-tokens", once, r=3).program.run(padded(16))["pooled"])
    other = text.replace("%keep2: bool[batch,{length}] = aten.ne", "%keep2: bool[batch,{length}] = aten.eq")
    result = run("merge-tokens", Program.parse(other.format(dim="", length=16)), r=3)
    assert "mask of padding is not that of the first attention" in result.rejected[0].reason


def test_varying_lengths_need_a_lower_bound() -> None:
    short = Program.parse(TEXT.format(dim="dim length in [1, 64]\n", length="length"))
    with pytest.raises(PassError, match=r"varies .* may be 1, where no token can leave"):
        run("merge-tokens", short, r=1)
    long = Program.parse(TEXT.format(dim="dim length in [16, 64]\n", length="length"))
    result = run("merge-tokens", long, r=3)
    found = lower(result.program, measure=False).run(**{name: value.numpy() for name, value in padded(21).items()})
    torch.testing.assert_close(
        torch.from_numpy(found["pooled"]), result.program.run(padded(21))["pooled"], rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_done_is_refused(captured: Program) -> None:
    with pytest.raises(PassError, match=r"Behind layer 1 there are 9 tokens .* at most 4 can leave, but r is 7"):
        run("merge-tokens", captured, r=7)
    with pytest.raises(PassError, match=r"cannot save 99% .* it saves \d+\.\d%"):
        run("merge-tokens", captured, fewer_flops=0.99)
    with pytest.raises(PassError, match="There is no layer 7: the program has 3 layers"):
        run("prune-tokens", captured, r=1, layers=(7,))
    with pytest.raises(DataError, match="fitted on calibration data, and there is none"):
        build_pass("slim-patches", {"r": 1}).run(captured, Context())
    for name, options in (
        ("merge-tokens", {"r": -1}),
        ("merge-tokens", {"fewer_flops": 1}),
        ("transform-tokens", {"points": 0}),
        ("transform-tokens", {"temperature": 0}),
        ("slim-patches", {"quantile": 1}),
        ("resize-patches", {"patch": 4, "image": 8}),
    ):
        with pytest.raises(UsageError, match="refuses"):
            build_pass(name, options)


def test_resized_kernels_see_in_resized_patches_what_they_saw() -> None:
    kernel, patch = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    larger = functional.interpolate(patch[None], (7, 6), mode="bilinear", align_corners=False)[0]
    resized = resize_kernel(kernel, (7, 6))
    torch.testing.assert_close((resized * larger).sum((1, 2, 3)), (kernel * patch).sum((1, 2, 3)))
    # smaller: no other kernel is nearer for white noise, whose error is |B^T w' - w|
    small = resize_kernel(kernel, (2, 2)).flatten(2)
    matrix = resize_matrix((4, 4), (2, 2)).t()
    residual = small @ matrix.t() - kernel.flatten(2)
    torch.testing.assert_close(residual @ matrix, torch.zeros_like(small), rtol=0, atol=1e-10)


def test_images_of_another_size_keep_the_grid(captured: Program, tmp_path: Path) -> None:
    result = run("resize-patches", captured, image=32)
    small = images(2)
    # enlarged patch by patch, as the kernel was
    patches = functional.unfold(small["pixel_values"], 4, stride=4).transpose(1, 2).reshape(-1, 1, 4, 4)
    large = functional.interpolate(patches, (8, 8), mode="bilinear", align_corners=False)
    image = functional.fold(large.reshape(2, 16, 64).transpose(1, 2), (32, 32), 8, stride=8)
    found = result.program.run({"pixel_values": image})["logits"]
    torch.testing.assert_close(found, captured.run(small)["logits"], rtol=1e-4, atol=1e-4)
    bank = tmp_path / "bank.safetensors"
    save_file({"p8": torch.ones(32, 1, 8, 8), "p3": torch.zeros(32, 1, 3, 3)}, bank)
    banked = run("resize-patches", captured, image=32, bank=str(bank)).program
    assert any(bool((value == 1).all()) for value in banked.parameters.values() if value.shape == (32, 1, 8, 8))
    save_file({"p8": torch.ones(3, 1, 8, 8)}, bank)
    with pytest.raises(DataError, match=r"must hold kernels \[32, 1, P, Q\], but holds p8"):
        run("resize-patches", captured, image=32, bank=str(bank))
