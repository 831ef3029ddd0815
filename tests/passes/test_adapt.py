"""Adapters of captured modules fold into the weights: the same answers from the target, and nothing left of them."""

from __future__ import annotations

import pytest
import torch
from adapters import AdapterBiasFfn, AdaptFormerBlock, LoraNetwork, PromptAttention, drawn
from torch import nn

import xformopt as xo
from xformopt.lowering import lower
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline, PipelineResult
from xformopt.program import Program
from xformopt.program.text import target_name

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def fold(name: str, module: nn.Module, x: torch.Tensor) -> PipelineResult:
    program = xo.capture(module, {"x": x}, dynamic={"x": {0: "batch", 1: "length"}})
    return Pipeline([parse_pass(name)]).run(program)


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def assert_artifact_agrees(module: nn.Module, program: Program, x: torch.Tensor) -> None:
    """The target's answers are the module's, at another batch and length than the example's."""
    (found,) = lower(program, measure=False).run(x=x.numpy()).values()
    wanted = module(x)
    assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) < TOLERANCE


@pytest.mark.parametrize("adapters", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_lora(adapters: int) -> None:
    module = drawn(LoraNetwork(adapters=adapters))
    result = fold("fold-lora", module, torch.randn(2, 6, 12))
    assert result.history[-1].fired == adapters + 1
    assert operators(result.program).count("xf.linear") == 2
    up = module.up
    merged = up.base_layer.weight.double()
    for down, back in zip(up.lora_A, up.lora_B, strict=True):
        merged = merged + up.scaling * back.weight.double() @ down.weight.double()
    assert any(torch.allclose(value.double(), merged, atol=1e-6) for value in result.program.parameters.values()
               if value.shape == merged.shape)  # fmt: skip
    assert_artifact_agrees(module, result.program, torch.randn(3, 5, 12))


@pytest.mark.parametrize("reads_output", [False, True])
def test_adapter_bias(reads_output: bool) -> None:
    module = drawn(AdapterBiasFfn(reads_output=reads_output))
    result = fold("fold-adapter-bias", module, torch.randn(2, 6, 12))
    assert operators(result.program).count("xf.linear") == 2
    w, v = module.alpha.weight.double(), module.v.double()
    kept, bias = module.dense_out.weight.double(), module.dense_out.bias.double()
    shift = torch.outer(v, w[0])
    wanted = kept + (shift @ kept if reads_output else shift)
    beta = module.alpha.bias.double() * v
    wanted_bias = bias + beta + (shift @ bias if reads_output else 0)
    for value in (wanted, wanted_bias):
        assert any(
            torch.allclose(found.double(), value, atol=1e-6)
            for found in result.program.parameters.values()
            if found.shape == value.shape
        )
    assert_artifact_agrees(module, result.program, torch.randn(3, 5, 12))


@pytest.mark.parametrize("reads", ["same", "own-norm"])
def test_parallel_adapters(reads: str) -> None:
    module = drawn(AdaptFormerBlock(reads))
    result = fold("fold-parallel-adapters", module, torch.randn(2, 6, 12))
    assert operators(result.program).count("xf.linear") == 2
    assert operators(result.program).count("xf.layer_norm") == 1
    assert sorted(value.shape[0] for value in result.program.parameters.values() if value.dim() == 2) == [12, 23]
    assert_artifact_agrees(module, result.program, torch.randn(3, 5, 12))


def test_an_ffn_with_the_adapters_function_is_not_cut() -> None:
    module = drawn(AdaptFormerBlock("same", function=nn.ReLU))
    result = fold("fold-parallel-adapters", module, torch.randn(2, 6, 12))
    assert not {"aten.cat", "aten.slice.Tensor"} & set(operators(result.program))
    assert_artifact_agrees(module, result.program, torch.randn(3, 5, 12))


def test_an_adapter_on_the_stream_stays() -> None:
    module = drawn(AdaptFormerBlock("stream"))
    (record,) = fold("fold-parallel-adapters", module, torch.randn(2, 6, 12)).history[-1:]
    assert not record.changed
    assert any("reads the stream in front of the norm" in reason for reason, _ in record.rejected)


@pytest.mark.parametrize(
    ("kv_heads", "gate_after"),
    [pytest.param(4, False, marks=pytest.mark.slow), (2, False), pytest.param(4, True, marks=pytest.mark.slow)],
)
def test_prompts(kv_heads: int, gate_after: bool) -> None:
    module = drawn(PromptAttention(kv_heads=kv_heads, gate_after=gate_after))
    result = fold("fold-prompts", module, torch.randn(2, 6, 32))
    names = operators(result.program)
    # queries, keys, values and the output: the projections of the prompt are gone, and so is the gate
    assert names.count("xf.linear") == 4
    assert names.count("xf.attention") == 2
    assert not {"aten.mul.Tensor", "aten.tanh", "aten.softmax.int"} & set(names)
    same_shape = [v for v in result.program.parameters.values() if v.shape == module.prompt.shape]
    assert not any(torch.equal(value, module.prompt) for value in same_shape)
    assert_artifact_agrees(module, result.program, torch.randn(3, 5, 32))
