"""Passes on what torch modules become, against the modules themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xformopt.capture.exporter import capture_module
from xformopt.passes import parse_pass
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.program.text import target_name

TOLERANCE = 1e-6


def settled(norm: nn.Module) -> nn.Module:
    """Give a batch norm statistics and parameters that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn + 0.5 if name in ("running_var", "weight") else drawn - 0.5)
    return norm


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(8, 6), nn.BatchNorm1d(6), (5, 8)),
}


def capture(module: nn.Module, x: torch.Tensor) -> Program:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return capture_module(module.eval(), {"input": x})


@pytest.mark.parametrize("kind", list(LAYERS))
def test_batch_norm_disappears(kind: str) -> None:
    layer, norm, shape = LAYERS[kind]
    module = nn.Sequential(layer, settled(norm))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    program = capture(module, x)
    assert any("batch_norm" in target_name(node.target) for node in program.nodes())
    result = parse_pass("fold-batch-norm").run(program, Context())
    assert [target_name(node.target) for node in result.program.nodes() if "norm" in target_name(node.target)] == []
    (folded,) = result.program.run({"input": x}).values()
    wanted = module(x)
    assert (folded - wanted).norm() <= TOLERANCE * wanted.norm()


def test_a_scalar_parameter_becomes_its_number() -> None:
    text = """program "m" captured
input %x: f32[4]
input %i: i64[4]
param %c: f32[]
param %d: f64[]
%a: f32[4] = aten.mul.Tensor(%x, %c)
%b: f64[4] = aten.mul.Tensor(%i, %d)
return a=%a, b=%b
"""
    parameters = {"c": torch.tensor(0.3), "d": torch.tensor(0.7, dtype=torch.float64)}
    program = Program.parse(text, parameters=parameters)
    result = parse_pass("canonicalize").run(program, Context())
    # as a number, 0.7 would make the product of integers float32
    assert list(result.program.parameters) == ["d"]
    assert "would make the result torch.float32" in result.rejected[0].reason
    inputs = {"x": torch.randn(4), "i": torch.arange(4)}
    assert torch.equal(result.program.run(inputs)["a"], program.run(inputs)["a"])


def test_folded_views_do_not_keep_what_they_view() -> None:
    text = """program "m" captured
input %x: f32[2]
param %w: f32[1000,2]
%a: f32[2] = aten.select.int(%w) {dim=0, index=3}
%y: f32[2] = aten.add.Tensor(%x, %a)
return y=%y
"""
    result = parse_pass("fold-constants").run(Program.parse(text), Context())
    (folded,) = result.program.parameters.values()
    assert folded.untyped_storage().nbytes() == folded.nbytes
