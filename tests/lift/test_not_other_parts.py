"""What looks like an activation, a norm, a rotation, a patch embedding, a gate or pooling, and is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

Function = Callable[..., torch.Tensor]


class Apply(nn.Module):
    """A function with two linear layers and vectors at hand."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.weight, self.bias = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(32))
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.function(self, x, *(() if y is None else (y,)))


def of_one(function: Function) -> Function:
    return lambda m, x: function(m.one(x))


NOT_ACTIVATIONS = {
    "sigmoid factor 1.6": of_one(lambda x: x * torch.sigmoid(1.6 * x)),
    "gelu without a half": of_one(lambda x: x * (1 + torch.erf(x / 2**0.5))),
    "gelu of another width": of_one(lambda x: 0.5 * x * (1 + torch.erf(x / 1.5))),
    "tanh gelu without the cube": of_one(lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * x))),
    "tanh gelu, another cube": of_one(lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.05 * x**3)))),
    "relu6": of_one(functional.relu6),
    "clamped far out": of_one(lambda x: x.clamp(0, 20)),
    "clamped at a small number": of_one(lambda x: x.clamp(min=1e-9)),
    "leaky relu": of_one(functional.leaky_relu),
    "elu": of_one(functional.elu),
    "mish": of_one(functional.mish),
    "hardswish": of_one(functional.hardswish),
    "squared relu": of_one(lambda x: functional.relu(x).square() * 1.0),
    "shifted": of_one(lambda x: x * torch.sigmoid(x + 1)),
    "another's gate": lambda m, x: m.one(x) * torch.sigmoid(m.two(x)),
}


@pytest.mark.parametrize("function", NOT_ACTIVATIONS.values(), ids=NOT_ACTIVATIONS.keys())
def test_not_an_activation(function: Function, lift: Any) -> None:
    lifted = lift(Apply(function), x=torch.randn(2, 9, 32))
    kinds = [lifted.attributes("xf.activation", i)["function"] for i in range(lifted.operators["xf.activation"])]
    # a square of a relu holds a relu
    assert kinds in ([], ["relu"])
    assert (kinds == ["relu"]) is (function is NOT_ACTIVATIONS["squared relu"])
    assert lifted.operators["xf.glu"] == 0
    lifted.check({"x": torch.randn(1, 4, 32) * 30})


def unbiased(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * m.weight + m.bias


def epsilon_outside(m: Any, x: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (x.var(-1, keepdim=True, unbiased=False).sqrt() + 1e-5)


def over_two_axes(m: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (9, 32))


def over_positions(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)


def mean_of_another(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.one(x)
    return (x - y.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def size_of_another(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(m.one(x).square().mean(-1, keepdim=True) + 1e-5)


def sum_of_squares(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-5)


def fourth_powers(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5)


NOT_NORMS = (
    unbiased,
    epsilon_outside,
    over_two_axes,
    over_positions,
    mean_of_another,
    size_of_another,
    sum_of_squares,
    fourth_powers,
)


@pytest.mark.parametrize("function", NOT_NORMS)
def test_not_a_norm(function: Function, lift: Any) -> None:
    dynamic = {"x": {0: "batch"}} if function is over_two_axes else "all"
    lifted = lift(Apply(function), dynamic, x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.layer_norm"] + lifted.operators["xf.rms_norm"] == 0
    lifted.check({"x": torch.randn(3, 9, 32)})


def affine_of_another_value(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (32,)) * y + m.bias


def test_a_computed_scale_is_no_weight(lift: Any) -> None:
    lifted = lift(Apply(affine_of_another_value), x=torch.randn(2, 9, 32), y=torch.randn(2, 9, 32))
    assert len(lifted.nodes("xf.layer_norm")[0].args) == 1
    lifted.check({"x": torch.randn(1, 4, 32), "y": torch.randn(1, 4, 32)})


def test_a_norm_read_twice_keeps_its_affine_apart(lift: Any) -> None:
    def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x, (32,))
        return normed * m.weight + m.one(normed)

    lifted = lift(Apply(twice), x=torch.randn(2, 9, 32))
    assert len(lifted.nodes("xf.layer_norm")[0].args) == 1


def rotate(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([-x[..., width:], x[..., :width]], -1)


class Rotary(nn.Module):
    """Heads turned by a function of (value, cos, sin)."""

    def __init__(self, turn: Function, repeat: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.turn, self.repeat = nn.Linear(32, 32), turn, repeat
        self.register_buffer("frequencies", 10.0 ** -torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x).unflatten(-1, (4, 8)).transpose(1, 2)
        angles = self.repeat(torch.arange(x.shape[1])[:, None] * self.frequencies)[None, None]
        return self.turn(heads, angles.cos(), angles.sin())


def twice(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles, angles], -1)


def reversed_second(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles, angles.flip(-1)], -1)


def pairs(angles: torch.Tensor) -> torch.Tensor:
    return angles.repeat_interleave(2, -1)


def usual(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + rotate(x, 4) * sin


NOT_ROTARY = {
    "unequal halves": (lambda x, cos, sin: x * cos + rotate(x, 3) * sin, twice),
    "no sign": (lambda x, cos, sin: x * cos + torch.cat([x[..., 4:], x[..., :4]], -1) * sin, twice),
    "sign on the other half": (lambda x, cos, sin: x * cos + torch.cat([x[..., 4:], -x[..., :4]], -1) * sin, twice),
    "angles in pairs for halves": (usual, pairs),
    "angles differ": (usual, reversed_second),
    "a difference": (lambda x, cos, sin: x * cos - rotate(x, 4) * sin, twice),
    "another value turned": (lambda x, cos, sin: x * cos + rotate(x.flip(2), 4) * sin, twice),
}


@pytest.mark.parametrize(("turn", "repeat"), NOT_ROTARY.values(), ids=NOT_ROTARY.keys())
def test_not_a_rotation(turn: Function, repeat: Any, lift: Any) -> None:
    lifted = lift(Rotary(turn, repeat), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.rope"] == 0
    lifted.check({"x": torch.randn(1, 4, 32)})


class Patches(nn.Module):
    def __init__(self, reshape: Function | None = None, **options: Any) -> None:
        super().__init__()
        self.reshape = reshape or (lambda y: y.flatten(2).transpose(1, 2))
        self.convolution = nn.Conv2d(4, 8, **options)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.reshape(self.convolution(image))


NOT_PATCHES: dict[str, dict[str, Any]] = {
    "overlap": {"kernel_size": 4, "stride": 2},
    "gaps": {"kernel_size": 2, "stride": 4},
    "padding": {"kernel_size": 4, "stride": 4, "padding": 1},
    "padding by name": {"kernel_size": 3, "padding": "same"},
    "dilation": {"kernel_size": 2, "stride": 2, "dilation": 2},
    "groups": {"kernel_size": 4, "stride": 4, "groups": 2},
    "one axis overlaps": {"kernel_size": (4, 4), "stride": (4, 2)},
    "columns first": {"kernel_size": 4, "stride": 4, "reshape": lambda y: y.transpose(2, 3).flatten(2).mT},
    "no transposition": {"kernel_size": 4, "stride": 4, "reshape": lambda y: y.flatten(2)},
}


@pytest.mark.parametrize("options", NOT_PATCHES.values(), ids=NOT_PATCHES.keys())
def test_not_a_patch_embedding(options: dict[str, Any], lift: Any) -> None:
    lifted = lift(Patches(**options), {"image": {0: "batch"}}, image=torch.randn(2, 4, 16, 20))
    assert lifted.operators["xf.patch_embedding"] == 0
    lifted.check({"image": torch.randn(3, 4, 16, 20)})


NOT_LINEAR: dict[str, Function] = {
    "computed weight": lambda m, x, y: x @ y.mT,
    "computed weight in linear": lambda m, x, y: functional.linear(x, y[0]),
    "sum of positions": lambda m, x, y: x.mT @ y,
}


@pytest.mark.parametrize("function", NOT_LINEAR.values(), ids=NOT_LINEAR.keys())
def test_not_a_linear_layer(function: Function, lift: Any) -> None:
    lifted = lift(Apply(function), x=torch.randn(2, 9, 32), y=torch.randn(2, 9, 32))
    constant = [n for n in lifted.nodes("xf.linear") if n.args[1].op == "get_attr"]
    assert constant == []
    lifted.check({"x": torch.randn(3, 4, 32), "y": torch.randn(3, 4, 32)})


NOT_GLU: dict[str, Function] = {
    "broadcast": lambda m, x: functional.silu(m.one(x)[..., :1]) * m.two(x),
    "broadcast over positions": lambda m, x: functional.silu(m.one(x)[:, :1]) * m.two(x),
    "the gate itself": lambda m, x: functional.silu(m.one(x)) * m.one(x).tanh().exp(),
    "a gate read twice": lambda m, x: (g := functional.silu(m.one(x))) * m.two(x) + g,
    "a vector": lambda m, x: functional.silu(m.one(x)) * m.weight,
}


@pytest.mark.parametrize("name", NOT_GLU)
def test_not_a_gated_unit(name: str, lift: Any) -> None:
    lifted = lift(Apply(NOT_GLU[name]), x=torch.randn(2, 9, 32))
    # a gate times another function of the same value is still a gate
    assert lifted.operators["xf.glu"] == (1 if name == "the gate itself" else 0)
    lifted.check({"x": torch.randn(1, 4, 32)})


def pooled(total: Function, count: Function) -> Function:
    def apply(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        spread = y[..., None].float()
        return total(x, spread) / count(spread)

    return apply


def usual_count(spread: torch.Tensor) -> torch.Tensor:
    return spread.sum(1).clamp(min=1e-9)


def usual_total(x: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    return (x * spread).sum(1)


NOT_POOLING: dict[str, Function] = {
    "kept axis": pooled(lambda x, m: (x * m).sum(1, keepdim=True), lambda m: m.sum(1, keepdim=True).clamp(min=1e-9)),
    "no clamp": pooled(usual_total, lambda m: m.sum(1) + 1e-9),
    "clamped above": pooled(usual_total, lambda m: m.sum(1).clamp(1e-9, 3)),
    "sum over channels": pooled(lambda x, m: (x * m).sum(2), lambda m: m.sum(2).clamp(min=1e-9)),
    "count of another": pooled(usual_total, lambda m: (1 - m).sum(1).clamp(min=1e-9)),
    "squared mask": pooled(lambda x, m: (x * m * m.exp()).sum(1), usual_count),
}


@pytest.mark.parametrize("function", NOT_POOLING.values(), ids=NOT_POOLING.keys())
def test_not_mean_pooling(function: Function, lift: Any) -> None:
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    lifted = lift(Apply(function), x=torch.randn(2, 9, 32), y=mask)
    assert lifted.operators["xf.mean_pool"] == 0
    lifted.check({"x": torch.randn(1, 4, 32), "y": torch.tensor([[1, 1, 0, 1]])})
