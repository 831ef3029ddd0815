"""Every architecture of the zoo is captured, lifted, optimized exactly, lowered, and computes what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import xformopt as xo
from xformopt.errors import UsageError
from xformopt.lift import lifting_rules
from xformopt.models.architecture import Architecture
from xformopt.models.zoo import architectures, find_architecture
from xformopt.program.text import target_name
from xformopt.rewrite import rewrite

# softmax attentions over tokens; what is not named here has none
ATTENTIONS = {
    "bert-tiny": 4,
    "caformer": 3,
    "conformer-micro": 3,
    "crossvit-micro": 10,
    "cswin-micro": 7,
    "cvt-tiny": 5,
    "deit-tiny": 4,
    "dit-micro": 3,
    "gpt-tiny": 4,
    "hvt-tiny": 4,
    "informer": 1,
    "itransformer": 3,
    "llama-tiny": 4,
    "llama-window": 4,
    "patchtst": 3,
    "pvt-linear": 5,
    "pvt-tiny": 5,
    "rtdetr-micro": 3,
    "shvit-micro": 4,
    "swin-micro": 4,
    "t5-encoder": 3,
    "t5-tiny": 9,
    "tnt-tiny": 6,
    "vit-dual-patchnorm": 4,
    "vit-joined": 2,
    "vit-parallel": 4,
    "vit-tiny": 4,
    "xcit-nano": 2,
}
# published sizes of families that have a small member too, and their softmax attentions
REAL_SIZES = {
    "bert-base": 12,
    "cvt-13": 13,
    "deit-small": 12,
    "dit-s-2": 12,
    "deit-small-distilled": 12,
    "gpt2": 12,
    "llama-160m": 12,
    "pvt-v2-b0": 8,
    "shvit-s1": 9,
    "swin-tiny": 12,
    "tnt-small": 24,
    "vit-base": 12,
}
LONGEST = 40
# what shares all but a part with another of its family
VARIANTS = (
    "convformer",
    "deit-tiny",
    "identityformer",
    "poolformer",
    "pvt-linear",
    "vit-dual-patchnorm",
    "vit-joined",
    "vit-parallel",
)
SMALL = [name for name in architectures() if name not in REAL_SIZES]


def shaken(architecture: Architecture) -> nn.Module:
    """Build with weights that hide no mistake: fresh models have unit norms, zero biases and tiny weights."""
    module = architecture.build()
    generator = torch.Generator().manual_seed(1)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point() or value.numel() < 2:
            continue
        if value.dim() <= 1:
            value.add_(torch.rand(value.shape, generator=generator) * 0.4 - (0.0 if "running_var" in name else 0.2))
        elif "embedding" not in name and value.std() < 0.03:
            value.mul_(3.0)
    return module


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert bool(ours.isfinite().all())
    return float((ours - theirs).double().norm() / theirs.double().norm())


def captured(module: nn.Module, inputs: dict[str, torch.Tensor]) -> xo.Program:
    """Capture as by default, but with lengths that are soon checked."""
    lengths = {
        name: {0: "batch", 1: (f"length_{value.shape[1]}", 1, LONGEST)}
        for name, value in inputs.items()
        if not value.is_floating_point() and value.dim() == 2
    }
    return xo.capture(module, inputs, lengths or None)


def check_lifting(program: xo.Program, attentions: int) -> None:
    operators = Counter(target_name(node.target) for node in program.nodes())
    assert operators["xf.attention"] == attentions
    assert not [operator for operator in operators if "scaled_dot_product" in operator]


def check_outputs(ours: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], most: float) -> None:
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        assert float(value.double().norm()) > 0
        assert distance(ours[key], value) <= most, key


def slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [name for name in SMALL if name not in VARIANTS] + slow(VARIANTS))
def test_lifting(name: str) -> None:
    module = shaken(find_architecture(name))
    inputs = module.example_inputs()  # type: ignore[operator]
    program = captured(module, inputs)
    lifted = rewrite(program, lifting_rules(program)).program
    check_outputs(lifted.run(inputs), module(**inputs), 1e-5)
    check_lifting(lifted, ATTENTIONS.get(name, 0))


def check_recipe(name: str, attentions: int) -> None:
    module = shaken(find_architecture(name))
    inputs = module.example_inputs()  # type: ignore[operator]
    result = xo.Pipeline.recipe("exact").run(captured(module, inputs), target="ort-cpu")
    check_lifting(result.program, attentions)
    artifact = xo.lower(result.program, target="ort-cpu", measure=False)
    ours = artifact.run(**{key: value.numpy() for key, value in inputs.items()})
    check_outputs({key: torch.from_numpy(value) for key, value in ours.items()}, module(**inputs), 1e-4)


@pytest.mark.parametrize("name", ["gpt-tiny", *slow(name for name in SMALL if name != "gpt-tiny")])
def test_the_exact_recipe(name: str) -> None:
    check_recipe(name, ATTENTIONS.get(name, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_SIZES)
def test_the_exact_recipe_on_real_sizes(name: str) -> None:
    check_recipe(name, REAL_SIZES[name])


def test_the_zoo_lists_what_is_there() -> None:
    assert set(ATTENTIONS) | set(REAL_SIZES) <= set(architectures())
    for name, architecture in architectures().items():
        assert architecture.name == name
        assert architecture.sources
        assert architecture.summary
        assert not architecture.summary.endswith(".")


def test_weights_come_from_the_seed_alone() -> None:
    vit = find_architecture("vit-tiny")
    state = torch.get_rng_state()
    one, same, other = vit.build(), vit.build(), vit.build(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)  # type: ignore[union-attr, arg-type]
    assert not one.training


def test_an_unknown_name_has_near_ones() -> None:
    with pytest.raises(UsageError, match="vit-tiny"):
        find_architecture("vit_tyni")
