"""16 bits: stored so where the target computes in 32, with the inputs and outputs that numpy has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import xformopt as xo
from xformopt.errors import LoweringError
from xformopt.original import capture_original
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.program import widened


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self, width: int = 32, heads: int = 4, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 64), activation(), nn.Linear(64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ff(x)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def distance(one: torch.Tensor, other: torch.Tensor | np.ndarray) -> float:
    wanted = one.double()
    return float((wanted - torch.as_tensor(other).double()).norm() / wanted.norm())


@pytest.mark.parametrize(("recipe", "drift"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_a_recipe_stores_half_the_bytes(recipe: str, drift: float, block: Block, tmp_path: Path) -> None:
    program = xo.capture(block, {"x": x()})
    exact = xo.lower(Pipeline.recipe("exact").run(program).program, measure=False)
    done = Pipeline.recipe(recipe).run(program)
    assert done.history[-1].changed
    artifact = xo.lower(done.program, measure=False)
    assert artifact.manifest.precision == recipe
    assert artifact.manifest.execution == {f"linear layers stored in {recipe}, computed in fp32": 6}
    assert artifact.size_bytes < 0.75 * exact.size_bytes
    artifact.save(tmp_path / "saved")
    found = xo.load(tmp_path / "saved").run(x=x().numpy())["output_0"]
    assert found.dtype == np.float32
    with torch.no_grad():
        assert 0 < distance(block(x()), found) < drift
    # it computes as the widened program does, whose weights are those that were rounded
    assert distance(widened(done.program).run({"x": x()})["output_0"], found) < 1e-5


def test_a_model_in_bfloat16_gets_inputs_that_numpy_has(block: Block) -> None:
    half = block.to(torch.bfloat16)
    artifact = xo.lower(Pipeline.recipe("exact").run(xo.capture(half, {"x": x(torch.bfloat16)})).program, measure=False)
    assert [spec.dtype for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs)] == ["f32", "f32"]
    found = artifact.run(x=x().numpy())["output_0"]
    with torch.no_grad():
        assert distance(block.float()(x()), found) < 1e-5


def test_a_model_in_float16_keeps_its_inputs(block: Block) -> None:
    half = block.half()
    artifact = xo.lower(Pipeline.recipe("exact").run(xo.capture(half, {"x": x(torch.float16)})).program, measure=False)
    assert [spec.dtype for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs)] == ["f16", "f16"]
    with torch.no_grad():
        assert distance(half(x(torch.float16)), artifact.run(x=x(torch.float16).numpy())["output_0"]) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_are_recognized_in_16_bits(dtype: torch.dtype, block: Block) -> None:
    result = Pipeline.recipe("exact").run(xo.capture(block.to(dtype), {"x": x(dtype)}))
    assert "xf.linear_activation" in str(result.program)
    assert "{function=gelu}" in str(result.program)


@pytest.mark.parametrize("recipe", ["int8", "int8-static", "int4"])
def test_float64_is_not_quantized_and_the_reason_is_told(recipe: str) -> None:
    given = x(torch.float64)
    program = xo.capture(Block(activation=nn.ReLU).double().eval(), {"x": given})
    result = Pipeline.recipe(recipe).run(program, calibration=[{"x": given}])
    reasons = [reason for record in result.history for reason, _ in record.rejected]
    assert any("convert-precision{to=fp32}" in reason for reason in reasons)
    assert xo.lower(result.program, measure=False).run(x=given.numpy())


def test_float64_runs_where_the_target_has_it_and_is_told_what_helps_elsewhere() -> None:
    torch.manual_seed(0)
    block, given = Block(activation=nn.ReLU).double().eval(), x(torch.float64)
    found = xo.lower(Pipeline.recipe("exact").run(xo.capture(block, {"x": given})).program, measure=False)
    with torch.no_grad():
        assert distance(block(given), found.run(x=given.numpy())["output_0"]) < 1e-7
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 2, 1), nn.Hardswish()).double().eval()
    with pytest.raises(LoweringError, match="Few operators run in float64"):
        xo.lower(xo.capture(convolution, {"input": images}), measure=False)
    narrowed = Pipeline([parse_pass("convert-precision{to=fp32}")]).run(xo.capture(convolution, {"input": images}))
    with torch.no_grad():
        wanted = convolution(images)
    assert distance(wanted, xo.lower(narrowed.program, measure=False).run(input=images.numpy())["output_0"]) < 1e-5


def test_a_model_in_bfloat16_is_compared_with_itself_on_arrays() -> None:
    class Half(Block):
        def example_inputs(self) -> dict[str, torch.Tensor]:
            return {"x": x(torch.bfloat16)}

    half = Half().to(torch.bfloat16).eval()
    program = capture_original(half).program
    assert [spec.dtype for spec in program.inputs] == [torch.float32]
    with torch.no_grad():
        assert torch.equal(program.run({"x": x()})["output_0"], half(x(torch.bfloat16)).float())
    assert program.parameter_bytes == sum(2 * parameter.numel() for parameter in half.parameters())
