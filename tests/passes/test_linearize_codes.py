"""Attention by binary codes and by distances: both formulas pair by pair, what codes learn, the artifact."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import xformopt as xo
from xformopt.errors import UsageError
from xformopt.lowering import lower
from xformopt.models.t5 import T5Config, T5Encoder
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.linearize.support.hashing import fit_hashing
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program
from xformopt.program.text import target_name

T, C, HEADS = 40, 8, 2
D = C // HEADS


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """``[B, T, H * D]`` to ``[B, H, T, D]``, float64."""
    return x.double().unflatten(-1, (HEADS, -1)).transpose(1, 2)


def clusters() -> torch.Tensor:
    """Unit vectors of one head in three groups, ``[1, 60, 6]``."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 6, generator=generator).repeat_interleave(20, 0)
    return functional.normalize(centres + 0.4 * torch.randn(60, 6, generator=generator), dim=-1).unsqueeze(0)


def test_codes_tell_similar_vectors_from_others() -> None:
    x = clusters()
    found = fit_hashing(x, bits=8, anchors=12, neighbours=10, seed=1)
    codes = found.codes(x)[0]
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    products = codes @ codes.t() / 8
    same = torch.arange(60)[:, None] // 20 == torch.arange(60) // 20
    assert float(products[same].mean()) > 0.4
    assert float(products[~same].mean()) < 0
    # by the definition: kappa less its mean, then the sign
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:12]
    squares = (x[0, :, None].double() - x[0, chosen].double()).square().sum(-1)
    kappa = (-squares / (2 * squares.mean())).exp()
    signs = torch.where((kappa - kappa.mean(0)) @ found.mixing[0].double() >= 0, 1.0, -1.0)
    assert float((signs == codes).double().mean()) > 0.99


def projected(causal: bool = False) -> Program:
    lines = [f"%{name}: f32[batch,{T},{C}] = xf.linear(%x, %w{name})" for name in "qkv"]
    parameters = {f"w{name}": f"param %w{name}: f32[{C},{C}]" for name in "qkv"}
    attributes = f"heads={HEADS}, kv_heads={HEADS}, scale=0.5"
    text = "\n".join(
        [
            'program "m" lifted',
            "dim batch in [1, inf]",
            f"input %x: f32[batch,{T},{C}]",
            *parameters.values(),
            *lines,
            f"%y: f32[batch,{T},{C}] = xf.attention(%q, %k, %v) {{{attributes}}}",
            "return y=%y\n",
        ]
    )
    generator = torch.Generator().manual_seed(2)
    return Program.parse(text, parameters={name: torch.randn(C, C, generator=generator) / 2 for name in parameters})


def test_codes_weigh_the_values() -> None:
    program = projected()
    batch = {"x": torch.randn(3, T, C, generator=torch.Generator().manual_seed(4))}
    chosen = build_pass("linearize-eco", {"force": True, "iterations": 30, "bits": 8, "max_error": 99.0})
    result = chosen.run(program, Context(calibration=[batch]))
    have = result.program.run(batch)["y"]
    found = {name.removeprefix("y."): value for name, value in result.program.parameters.items()}
    x = functional.normalize(heads_of(functional.linear(batch["x"], found["shared.weight"])).float(), dim=-1)
    bits = ((x @ found["anchors"] + found["offset"]).exp() @ found["mixing"] >= found["thresholds"]).double() * 2 - 1
    weights = bits @ bits.transpose(-1, -2) + 8
    assert float(weights.min()) >= 0
    values = heads_of(functional.linear(batch["x"], found["v.weight"]))
    wanted = (weights @ values / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    assert relative(have, wanted) < 1e-4
    assert "with a shared projection the largest error" in "".join(result.notes)
    artifact = xo.lower(result.program, "ort-cpu", measure=False)
    assert relative(torch.from_numpy(artifact.run(x=batch["x"].numpy())["y"]), have) < 1e-4
    pytest.importorskip("tvm")
    compiled = xo.lower(result.program, "tvm-cpu", sizes={"batch": 3}, measure=False)
    assert compiled.manifest.forms["hamming_attention"] == {"kernel": 1}
    assert relative(torch.from_numpy(compiled.run(x=batch["x"].numpy())["y"]), have) < 1e-4


def test_codes_are_learned_anew_on_what_the_program_computes_by_now() -> None:
    batch = {"x": torch.randn(8, T, C, generator=torch.Generator().manual_seed(4))}
    context = Context(calibration=[batch])
    chosen = build_pass("linearize-eco", {"force": True, "iterations": 10, "bits": 4, "max_error": 99.0})
    hashed = chosen.run(projected(), context).program
    # as if training had moved the shared projection
    name = next(name for name in hashed.parameters if "shared.weight" in name)
    moved = hashed.copy()
    moved.parameters[name] = hashed.parameters[name].roll(1, 0) + 0.3
    again = build_pass("rehash-attention", {})
    result = again.run(moved, context)
    assert len(result.fired) == 1
    tables = [result.program.parameters[str(node.target)] for node in result.program.graph.find_nodes(op="get_attr")]
    rows = functional.linear(batch["x"], moved.parameters[name]).flatten(0, 1)
    rows = rows[torch.linspace(0, len(rows) - 1, 256).round().long()]
    vectors = functional.normalize(rows.unflatten(-1, (HEADS, -1)), dim=-1).transpose(0, 1)
    wanted = fit_hashing(vectors, bits=4, anchors=25, neighbours=10, seed=0)
    for table in (wanted.anchors, wanted.offset, wanted.mixing, wanted.thresholds):
        assert any(table.shape == found.shape and bool(torch.isclose(table, found).all()) for found in tables)
    # the same data give the same codes
    settled = again.run(result.program, context)
    assert not settled.changed
    assert "those of this data already" in settled.rejected[0].reason
    found = result.program.run(batch)["y"]
    artifact = xo.lower(result.program, "ort-cpu", measure=False)
    assert relative(torch.from_numpy(artifact.run(x=batch["x"].numpy())["y"]), found) < 1e-4


@pytest.mark.parametrize(
    "text",
    [
        "rehash-attention{neighbours=0}",
        "linearize-eco{bits=0}",
        "linearize-eco{anchors=0}",
        "linearize-toeplitz{features=0}",
    ],
)
def test_counts_are_positive(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pass(text)


def test_distances_keep_their_biases() -> None:
    lines = [f"input %{name}: f32[batch,{T},{C}]" for name in "qkv"]
    text = "\n".join(
        [
            'program "m" lifted',
            "dim batch in [1, inf]",
            *lines,
            f"input %b: f32[1,{HEADS},{T},{T}]",
            f"%y: f32[batch,{T},{C}] = xf.attention(%q, %k, %v, none, %b) {{heads=2, kv_heads=2, scale=0.5}}",
            "return y=%y\n",
        ]
    )
    generator = torch.Generator().manual_seed(6)
    batch = {name: torch.randn(2, T, C, generator=generator) for name in "qkv"}
    table = torch.randn(HEADS, 2 * T - 1, generator=generator)
    distance = torch.arange(T) - torch.arange(T)[:, None]
    batch["b"] = table[:, distance + T - 1].unsqueeze(0)
    chosen = build_pass("linearize-toeplitz", {"force": True, "features": 16, "max_error": 99.0})
    result = chosen.run(Program.parse(text), Context(calibration=[batch]))
    (w,) = (value.double() for name, value in result.program.parameters.items() if "random_features" in name)
    q, k = (functional.normalize(heads_of(batch[name]), dim=-1) @ w for name in "qk")
    # vectors of length one: exp(-1/2) and the root of m are factors of every weight
    weights = q.exp() @ k.exp().transpose(-1, -2) * batch["b"].double().exp()
    wanted = (weights @ heads_of(batch["v"]) / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    assert relative(result.program.run(batch)["y"], wanted) < 1e-4


@pytest.mark.slow
def test_relative_positions_of_t5_are_found() -> None:
    torch.manual_seed(0)
    module = T5Encoder(T5Config(vocabulary=16, width=8, depth=1, heads=2, head_width=4, hidden=8)).eval()
    batch = {"input_ids": torch.randint(0, 16, (2, 30)), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    program = xo.capture(module, batch)
    text = "linearize-toeplitz{force=true,iterations=3,max_error=99}"
    result = Pipeline([parse_pass(text)]).run(program, calibration=[batch])
    assert "xf.toeplitz_attention" in {target_name(node.target) for node in result.program.nodes()}
    artifact = lower(result.program, measure=False)
    for length in (1, 2, 7, 45):
        other = {"input_ids": torch.randint(0, 16, (2, length)), "attention_mask": torch.ones(2, length).long()}
        found = artifact.run(**{name: value.numpy() for name, value in other.items()})["hidden"]
        assert relative(torch.from_numpy(found), result.program.run(other)["hidden"]) < 1e-5
    without = Pipeline([parse_pass(text.replace("force=true,", ""))]).run(program, calibration=[batch])
    assert "crossover" in without.history[-1].rejected[0][0] or "cheaper" in without.history[-1].rejected[0][0]
    assert not math.isnan(result.history[-1].drift)
