"""Routed attention as a pass: which heads are local, where centroids lie, the target, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xformopt.analysis import cost
from xformopt.errors import DataError, UsageError
from xformopt.lowering import lower
from xformopt.match import xf
from xformopt.passes import build_pass
from xformopt.passes.recover.support.trainable import parts_of
from xformopt.passes.sparsify.localize_attention import widest_window
from xformopt.passes.sparsify.support.centroids import fit_centroids
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program

Batch = dict[str, torch.Tensor]
# grouped keys with a bias by distance and padding
TEXT = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 40]
input %x: f32[batch,length,32]
input %mask: i64[batch,length]
input %far: f32[1,4,length,length]
param %k.w: f32[16,32]
param %v.w: f32[16,32]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%k: f32[batch,length,16] = xf.linear(%x, %k.w)
%v: f32[batch,length,16] = xf.linear(%x, %v.w)
%a: f32[batch,length,32] = xf.attention(%x, %k, %v, %keep, %far) {heads=4, kv_heads=2, scale=0.35}  # layers.0
return hidden=%a valid keep %mask
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def encoder() -> Program:
    return Program.parse(TEXT, seed=3)


def inputs(length: int) -> Batch:
    """Heads 1 and 3 look near themselves."""
    generator = torch.Generator().manual_seed(length)
    at = torch.arange(length)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[-1, length - length // 3 :] = 0
    far = -(at - at[:, None]).abs().float() * torch.tensor([0.0, 9.0, 0.0, 9.0])[:, None, None]
    return {"x": torch.randn(2, length, 32, generator=generator), "mask": mask, "far": far[None].contiguous()}


def run(program: Program, **options: Any) -> PassResult:
    return build_pass("route-attention", options).run(program, Context(calibration=(inputs(40), inputs(24))))


def check_artifact(program: Program) -> None:
    artifact = lower(program, measure=False)
    for length in (1, 9, 40):
        given = inputs(length)
        expected = program.run(given)["hidden"]
        found = torch.from_numpy(artifact.run(**{name: value.numpy() for name, value in given.items()})["hidden"])
        valid = given["mask"] != 0
        torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_heads_that_look_near_are_local_and_the_others_routed(encoder: Program) -> None:
    result = run(encoder, clusters=4)
    assert len(result.fired) == 1
    parts = {n.operator: n.flops for n in cost(result.program, {"batch": 2, "length": 40}).by_node}
    assert parts["xf.routing_attention"] == 2 * 2 * 2 * (4 * 10 * 10 * 16 + 2 * 40 * 4 * 8)
    # heads 1 and 3 lose next to nothing by their window, and stand where they stood
    given = inputs(24)
    found, expected = (p.run(given)["hidden"].unflatten(-1, (4, 8)) for p in (result.program, encoder))
    valid = given["mask"] != 0
    torch.testing.assert_close(found[valid][:, 1::2], expected[valid][:, 1::2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[valid][:, ::2], expected[valid][:, ::2], atol=1e-2)
    check_artifact(result.program)


@pytest.mark.parametrize("causal", [False, True])
def test_all_heads_are_routed_where_none_is_local(encoder: Program, causal: bool) -> None:
    text = TEXT.replace("kv_heads=2,", "kv_heads=2, causal=true,") if causal else TEXT
    result = run(Program.parse(text, seed=3), clusters=3, local=0.0, causal=causal)
    assert [node.operator for node in cost(result.program).by_node if "attention" in node.operator] == [
        "xf.routing_attention"
    ]
    assert next(value for name, value in result.program.parameters.items() if "centroids" in name).shape == (4, 3, 8)
    check_artifact(result.program)


def test_the_number_of_clusters_is_the_root_of_the_longest_input(encoder: Program) -> None:
    result = run(encoder)
    shapes = {tuple(value.shape) for name, value in result.program.parameters.items() if "centroids" in name}
    assert shapes == {(2, 6, 8)}


def test_where_nothing_bounds_the_length_the_data_does() -> None:
    result = run(Program.parse(TEXT.replace("length in [1, 40]", "length in [1, inf]"), seed=3), clusters=4)
    (local,) = [node for node in result.program.nodes() if node.target is xf.local_attention]
    assert local.kwargs["window_left"] == widest_window(40, 1 / 4, causal=False)


def test_centroids_are_the_means_of_what_is_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.eye(5, 8).double(), dim=-1)
    vectors = directions.repeat_interleave(20, 0) + 0.05 * torch.randn(100, 8, generator=generator).double()
    vectors = torch.nn.functional.normalize(vectors, dim=-1) * 8**0.5
    found = fit_centroids(vectors, 5, generator)
    owners = (vectors @ found.t()).argmax(1)
    assert sorted(owners.bincount().tolist()) == [20] * 5
    for number in range(5):
        mean = vectors[owners == number].mean(0)
        torch.testing.assert_close(found[number], mean / mean.norm() * 8**0.5)


def test_equal_vectors_still_make_centroids() -> None:
    found = fit_centroids(torch.ones(9, 4).double(), 3, torch.Generator().manual_seed(0))
    assert bool(found.isfinite().all())
    assert found.shape == (3, 4)


def test_the_pipeline_runs_it_and_recovery_leaves_centroids_alone(encoder: Program) -> None:
    found = Pipeline([build_pass("route-attention", {"clusters": 2})]).run(encoder, calibration=[inputs(40)])
    assert found.history[0].changed
    assert 0 < found.history[0].relative_l2 < 1
    trainable, refused = parts_of(found.program)
    assert set(trainable) == {"k.w", "v.w"}
    assert "it is the centroids of" in refused["layers.0.centroids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clusters": 1}, "clusters must be at least 2"), ({"local": 1.0}, "local must be at least 0 and below 1")],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pass("route-attention", options)


def test_clusters_need_data(encoder: Program) -> None:
    with pytest.raises(DataError, match="Clusters of tokens are found on calibration data, and there is none"):
        build_pass("route-attention", {}).run(encoder, Context())
