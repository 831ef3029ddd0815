"""Passes that compute a part of attention: against masks written out, on the target, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xformopt.analysis import cost
from xformopt.errors import DataError, PassError, UsageError
from xformopt.lowering import lower
from xformopt.passes import build_pass
from xformopt.passes.sparsify.localize_attention import widest_window
from xformopt.passes.sparsify.support.answer_losses import collect_losses
from xformopt.passes.sparsify.support.attention_maps import BlockMap, collect_maps
from xformopt.passes.sparsify.support.static_masks import amplified, extend_mask, select_blocks
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program

Batch = dict[str, torch.Tensor]

# grouped keys with a bias by distance and padding, then causal attention
TEXT = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 40]
input %x: f32[batch,length,32]
input %mask: i64[batch,length]
input %far: f32[1,4,length,length]
param %q.w: f32[32,32]
param %k.w: f32[16,32]
param %v.w: f32[16,32]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%q: f32[batch,length,32] = xf.linear(%x, %q.w)
%k: f32[batch,length,16] = xf.linear(%x, %k.w)
%v: f32[batch,length,16] = xf.linear(%x, %v.w)
%a: f32[batch,length,32] = xf.attention(%q, %k, %v, %keep, %far) {heads=4, kv_heads=2, scale=0.35}  # layers.0
%s: f32[batch,length,32] = aten.add.Tensor(%a, %x)
%b: f32[batch,length,32] = xf.attention(%s, %s, %s) {heads=4, kv_heads=4, scale=0.35, causal=true}  # layers.1
%t: f32[batch,length,32] = aten.add.Tensor(%b, %s)
return hidden=%t valid keep %mask
"""


WITHOUT_BIAS = TEXT.replace(", %keep, %far)", ", %keep)").replace("input %far: f32[1,4,length,length]\n", "")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def encoder() -> Program:
    return Program.parse(TEXT, seed=3)


def inputs(length: int, batch: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(length)
    at = torch.arange(length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - length // 3 :] = 0
    far = -(at - at[:, None]).abs().float().expand(1, 4, length, length) / 4
    return {"x": torch.randn(batch, length, 32, generator=generator), "mask": mask, "far": far.contiguous()}


def run(name: str, program: Program, **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=(inputs(40), inputs(24))))


def check_artifact(program: Program) -> None:
    artifact = lower(program, measure=False)
    for length in (1, 9, 40):
        given = {name: value for name, value in inputs(length).items() if name in program.input_names}
        expected = program.run(given)["hidden"]
        found = torch.from_numpy(artifact.run(**{name: value.numpy() for name, value in given.items()})["hidden"])
        assert bool(found.isfinite().all())
        valid = given["mask"] != 0
        torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_masks_are_found_and_their_blocks_alone_computed(encoder: Program) -> None:
    result = run("mask-attention", encoder, keep=0.4, block=4)
    assert len(result.fired) == 2
    masks = [value for value in result.program.parameters.values() if value.dtype == torch.bool]
    assert [tuple(mask.shape) for mask in masks] == [(4, 10, 10), (4, 10, 10)]
    visible = [100, 55]
    assert sum(int(mask.sum()) for mask in masks) == round(0.4 * 4 * sum(visible))
    assert result.notes == (f"attention computed at the longest input: {0.4:.1%}",)
    assert not masks[1].triu(1).any()
    sizes = {"batch": 2, "length": 40}
    parts = [node.flops for node in cost(result.program, sizes).by_node if "attention" in node.operator]
    assert parts == [2 * 2 * 16 * (8 + 8) * int(mask.sum()) for mask in masks]
    check_artifact(result.program)


def test_a_map_is_the_mean_over_queries_that_exist(encoder: Program) -> None:
    given = inputs(10)
    found = collect_maps(encoder, [given], ["a"], block=4)["a"]
    q, k = (given["x"] @ encoder.parameters[name].t() for name in ("q.w", "k.w"))
    total = torch.zeros(4, 3, 3, dtype=torch.float64)
    count = torch.zeros(3, 3, dtype=torch.float64)
    for b, length in ((0, 10), (1, 7)):
        for i in range(length):
            for m in range(-(-length // 4)):
                count[i // 4, m] += 1
            for h in range(4):
                keys = k[b, :length, h // 2 * 8 : h // 2 * 8 + 8]
                logits = 0.35 * keys @ q[b, i, h * 8 : h * 8 + 8] + given["far"][0, h, i, :length]
                for j, weight in enumerate(logits.softmax(0).tolist()):
                    total[h, i // 4, j // 4] += weight
    torch.testing.assert_close(found.mean, total / count.clamp(min=1), rtol=1e-5, atol=1e-6)


def test_a_block_is_worth_what_the_answer_loses() -> None:
    text = TEXT.replace("return hidden=%t valid keep %mask", "return hidden=%a").split("%s:")[0]
    text += "return hidden=%a\n"
    program = Program.parse(text, seed=3)
    given = inputs(10)
    maps = collect_maps(program, [given], ["a"], block=4)
    found = collect_losses(program, [given], maps, block=4, capture=None, seed=5, progress=Context().progress)["a"]
    # the answer is the attention itself, so that a drawn answer's gradient is the noise that was drawn
    generator = torch.Generator().manual_seed(5)
    felt = [torch.randn(20, 32, generator=generator).reshape(2, 10, 4, 8) for _ in range(4)]
    q, k, v = (given["x"] @ program.parameters[name].t() for name in ("q.w", "k.w", "v.w"))
    output = program.run(given)["hidden"].reshape(2, 10, 4, 8)
    wanted = torch.zeros(4, 3, 3, dtype=torch.float64)
    for gradient in felt:
        moved = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
        for b, length in ((0, 10), (1, 7)):
            for h in range(4):
                own = slice(h // 2 * 8, h // 2 * 8 + 8)
                for i in range(10):
                    logits = 0.35 * k[b, :length, own] @ q[b, i, h * 8 : h * 8 + 8] + given["far"][0, h, i, :length]
                    for j, weight in enumerate(logits.softmax(0).tolist()):
                        step = weight / max(1 - weight, 0.05) * (v[b, j, own] - output[b, i, h])
                        moved[b, h, i // 4, j // 4] += float(gradient[b, i, h] @ step)
        wanted += moved.square().sum(0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_queries_that_no_answer_comes_from_get_nothing() -> None:
    text = TEXT.replace(
        "return hidden=%t valid keep %mask", "%first: f32[batch,32] = aten.select.int(%b) {dim=1, index=0}"
    )
    program = Program.parse(text.replace(", causal=true", "") + "return hidden=%first\n", seed=3)
    result = run("mask-attention", program, keep=0.5, block=4)
    last = [value for value in result.program.parameters.values() if value.dtype == torch.bool][1]
    assert int(last[:, 0].sum()) > 20
    assert torch.equal(last[:, 1:], torch.eye(10).bool()[1:].expand(4, 9, 10))


@pytest.mark.parametrize("score", ["amplified", "mass", "answer"])
def test_each_score_keeps_the_share_asked_for(encoder: Program, score: str) -> None:
    result = run("mask-attention", encoder, keep=0.4, block=4, score=score)
    assert result.notes == (f"attention computed at the longest input: {0.4:.1%}",)


def test_the_best_blocks_of_all_heads_stay() -> None:
    mass = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.5, 0.4], [0.2, 0.3, 0.5]]], dtype=torch.float64)
    maps = {"one": BlockMap(mass, torch.ones(3, 3).double(), False)}
    scores = {name: amplified(found, 0.5) for name, found in maps.items()}
    mask = select_blocks(maps, scores, 5 / 9)["one"][0]
    assert mask.tolist() == [[True, True, False], [False, True, True], [False, False, True]]
    # later keys have no part where queries do not see them
    causal = {"one": BlockMap(mass.tril(), torch.ones(3, 3).double(), True)}
    assert select_blocks(causal, scores, 4 / 6)["one"][0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, True, True],
    ]


def test_patterns_go_on_behind_what_was_seen() -> None:
    # blocks at distance 0 and 1, and the first block for all
    mask = torch.eye(6).bool() | torch.eye(6).bool().roll(1, 0).tril() | (torch.arange(6) == 0)
    longer = extend_mask(mask[None], 9, 0.5, causal=True)[0]
    back = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(longer, (back == 0) | (back == 1) | ((torch.arange(9) == 0) & (back >= 0)))
    # what is no pattern ends where it was seen: only the diagonal goes on
    alone = torch.eye(6).bool()
    alone[5, 2] = True
    longer = extend_mask(alone[None], 9, 0.5, causal=False)[0]
    assert bool(longer[5, 2])
    assert int(longer.sum()) == 10
    assert torch.equal(extend_mask(mask[None], 4, 0.5, causal=True)[0], mask[:4, :4])


def test_masks_behind_the_capture_length(encoder: Program) -> None:
    result = run("mask-attention", encoder, keep=0.6, block=4, capture=16)
    for mask in (value for value in result.program.parameters.values() if value.dtype == torch.bool):
        assert mask.shape[1] == 10
        assert bool(mask.diagonal(0, 1, 2).all())
    check_artifact(result.program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep must lie between 0 and 1"),
        ({"block": 0}, "block must be at least 1"),
        ({"capture": 40, "block": 32}, "capture must hold two blocks"),
        ({"match": 0.0}, "match must be above 0"),
    ],
)
def test_options_of_masks_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pass("mask-attention", options)


def test_data_that_tells_nothing_of_blocks_is_refused(encoder: Program) -> None:
    with pytest.raises(DataError, match="too short to tell blocks apart"):
        build_pass("mask-attention", {"block": 64}).run(encoder, Context(calibration=(inputs(40),)))
    with pytest.raises(DataError, match="there is none"):
        build_pass("mask-attention", {}).run(encoder, Context())
    with pytest.raises(PassError, match="which every query needs"):
        run("mask-attention", encoder, keep=0.05, block=8)


def test_queries_that_see_no_key_get_zeros(encoder: Program) -> None:
    result = run("mask-attention", encoder, keep=0.4, block=4)
    given = {**inputs(40), "mask": torch.zeros(2, 40, dtype=torch.int64)}
    artifact = lower(result.program, measure=False)
    found = artifact.run(**{name: value.numpy() for name, value in given.items()})["hidden"]
    assert bool(torch.from_numpy(found).isfinite().all())
    torch.testing.assert_close(torch.from_numpy(found), result.program.run(given)["hidden"], rtol=1e-4, atol=1e-5)


def test_the_pipeline_runs_it(encoder: Program) -> None:
    steps = Pipeline([build_pass("mask-attention", {"keep": 0.9, "block": 4})])
    (record,) = steps.run(encoder, calibration=[inputs(40)]).history
    assert record.changed
    assert 0 < record.relative_l2 < 0.3


@pytest.mark.parametrize("coarse", [True, False])
def test_blocks_are_refined_where_they_matter(encoder: Program, coarse: bool) -> None:
    result = run("refine-attention", encoder, keep=0.3, block=4, coarse=coarse)
    assert len(result.fired) == 2
    sizes = {"batch": 2, "length": 40}
    parts = [node.flops for node in cost(result.program, sizes).by_node if "attention" in node.operator]
    # 30 of 100 blocks and 17 of 55, and the means of all 100
    means = 100 * (32 + 32 * coarse)
    assert parts == [2 * 2 * (30 * 16 * 64 + means), 2 * 2 * (17 * 16 * 64 + means)]
    check_artifact(result.program)


def test_all_blocks_refined_are_attention_itself(encoder: Program) -> None:
    result = run("refine-attention", encoder, keep=0.999, block=4)
    given = inputs(40)
    torch.testing.assert_close(result.program.run(given)["hidden"], encoder.run(given)["hidden"], rtol=1e-4, atol=1e-5)


def test_queries_that_are_rated_highest_attend(encoder: Program) -> None:
    result = run("rank-queries", encoder, keep=0.25, samples=8, causal=True)
    assert len(result.fired) == 2
    sizes = {"batch": 2, "length": 40}
    parts = [node.flops for node in cost(result.program, sizes).by_node if "attention" in node.operator]
    assert parts == [2 * 2 * (10 * 40 * 64 + 40 * 8 * 32)] * 2
    check_artifact(result.program)
    (reject,) = run("rank-queries", encoder, keep=0.25, samples=8).rejected
    assert "would depend on later ones" in reject.reason


def test_blocks_stand_for_their_keys(encoder: Program) -> None:
    (reject,) = run("combine-regions", encoder, block=8).rejected
    assert "bias between tokens" in reject.reason
    result = run("combine-regions", Program.parse(WITHOUT_BIAS, seed=3), block=8)
    assert len(result.fired) == 2
    sizes = {"batch": 2, "length": 40}
    parts = [node.flops for node in cost(result.program, sizes).by_node if "attention" in node.operator]
    assert parts == [2 * 2 * 40 * (8 + 5 + 1) * 64] * 2
    check_artifact(result.program)


def test_channels_are_mixed_by_their_largest_products() -> None:
    text = """
program "channels" lifted
dim batch in [1, inf]
input %x: f32[batch,9,24]
param %t: f32[2]
%y: f32[batch,9,24] = xf.xca(%x, %x, %x, %t) {heads=2}
return y=%y
"""
    program = Program.parse(text, parameters={"t": torch.tensor([2.0, 3.0])})
    result = build_pass("select-channels", {}).run(program, Context())
    assert result.notes == ("no work is saved: all products of channels are computed",)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    found = result.program.run({"x": x})["y"]
    heads = torch.nn.functional.normalize(x, dim=1).unflatten(2, (2, 12)).permute(0, 2, 3, 1)  # [B, H, D, T]
    logits = heads @ heads.transpose(-1, -2) * program.parameters["t"][:, None, None]
    parts = []
    for count in (6, 8, 9, 9):
        chosen = torch.full_like(logits, float("-inf"))
        best = logits.topk(count)
        chosen.scatter_(-1, best.indices, best.values)
        parts.append(chosen.softmax(-1) @ x.unflatten(2, (2, 12)).permute(0, 2, 3, 1))
    expected = torch.stack(parts).mean(0).permute(0, 3, 1, 2).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    artifact = lower(result.program, measure=False)
    torch.testing.assert_close(torch.from_numpy(artifact.run(x=x.numpy())["y"]), found, rtol=1e-4, atol=1e-5)
    assert not build_pass("select-channels", {}).run(result.program, Context()).changed


def test_the_most_sensitive_layers_stay_full() -> None:
    # the second attention has no part in the answer
    text = TEXT.replace("%b: ", "%idle: ").replace("(%b, %s)", "(%c, %s)")
    text = text.replace(", %keep, %far) {heads=4, kv_heads=2", ", %keep) {heads=4, kv_heads=2")
    text = text.replace("%t: ", "%c: f32[batch,length,32] = aten.mul.Scalar(%idle) {other=0.001}\n%t: ")
    program = Program.parse(text.replace("input %far: f32[1,4,length,length]\n", ""), seed=3)
    batches = tuple({name: value for name, value in inputs(n).items() if name != "far"} for n in (40, 24))
    result = build_pass("localize-attention", {"keep": 0.7, "full": 1}).run(program, Context(calibration=batches))
    kinds = [node.operator for node in cost(result.program).by_node if "attention" in node.operator]
    assert kinds == ["xf.attention", "xf.local_attention"]
    assert result.notes[1] == "full attention: layers.0"
    assert [reject.reason for reject in result.rejected] == ["it is among the layers that need their reach most"]
    window = widest_window(40, 0.4, causal=True)
    assert window is not None
    assert result.notes[0] == f"window: {window} tokens to each visible side"
    pairs = sum(min(i, window) + 1 for i in range(40))
    wider = sum(min(i, window + 1) + 1 for i in range(40))
    assert pairs <= 0.4 * 40 * 41 / 2 < wider
    artifact = lower(result.program, measure=False)
    found = torch.from_numpy(artifact.run(**{name: value.numpy() for name, value in batches[1].items()})["hidden"])
    torch.testing.assert_close(found, result.program.run(batches[1])["hidden"], rtol=1e-4, atol=1e-5)


def test_a_window_takes_its_bias_along(encoder: Program) -> None:
    result = run("localize-attention", encoder, keep=0.7, full=0)
    assert len(result.fired) == 2
    check_artifact(result.program)
    # where the window is the whole sequence, nothing changes
    wide = run("localize-attention", encoder, keep=0.999, full=0)
    given = inputs(24)
    valid = given["mask"] != 0
    expected, found = (program.run(given)["hidden"][valid] for program in (encoder, wide.program))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_as_wide_as_its_share(causal: bool) -> None:
    for length, share in ((7, 0.4), (40, 0.25), (9, 0.999)):
        found = widest_window(length, share, causal=causal)
        assert found is not None
        allowed = share * (length * (length + 1) / 2 if causal else length**2)

        def seen(w: int, length: int = length) -> int:
            return sum(-w <= j - i <= (0 if causal else w) for i in range(length) for j in range(length))

        assert seen(found) <= allowed < seen(found + 1)
    assert widest_window(8, 0.01, causal=causal) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("refine-attention", {"keep": 1.0}, "keep must lie between 0 and 1"),
        ("refine-attention", {"block": 0}, "block must be at least 1"),
        ("localize-attention", {"keep": 0.0}, "keep must lie between 0 and 1"),
        ("localize-attention", {"full": -1}, "full must be at least 0"),
        ("rank-queries", {"factor": 0.0}, "factor must be positive"),
        ("rank-queries", {"keep": 1.0}, "keep must lie between 0 and 1"),
        ("rank-queries", {"samples": 0}, "samples must be at least 1"),
        ("combine-regions", {"block": 1}, "block must be at least 2"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pass(name, options)


def test_windows_that_cannot_be_had_are_refused(encoder: Program) -> None:
    with pytest.raises(PassError, match="All 2 attentions that could have a window are to stay full"):
        run("localize-attention", encoder, full=2)
    with pytest.raises(DataError, match="there is none"):
        build_pass("localize-attention", {}).run(encoder, Context())
