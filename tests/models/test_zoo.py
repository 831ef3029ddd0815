"""Every architecture of the zoo is captured, lifted, optimized exactly, lowered, and computes what it did."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import xformopt as xo
from xformopt.errors import UsageError
from xformopt.models.architecture import Architecture
from xformopt.models.zoo import architectures, find_architecture
from xformopt.program.text import target_name

# softmax attentions over tokens; what is not named here has none
ATTENTIONS = {
    "bert-tiny": 4,
    "deit-tiny": 4,
    "gpt-tiny": 4,
    "llama-tiny": 4,
    "llama-window": 4,
    "patchtst": 3,
    "pvt-linear": 5,
    "pvt-tiny": 5,
    "t5-encoder": 3,
    "t5-tiny": 9,
    "vit-dual-patchnorm": 4,
    "vit-parallel": 4,
    "vit-tiny": 4,
}
# published sizes of families that the list above has in small
REAL_SIZES = ("bert-base", "deit-small", "deit-small-distilled", "gpt2", "llama-160m", "pvt-v2-b0", "vit-base")
SMALL = [name for name in architectures() if name not in REAL_SIZES]


def shaken(architecture: Architecture) -> nn.Module:
    """Build with weights that hide no mistake: fresh models have unit norms, zero biases and tiny weights."""
    module = architecture.build()
    generator = torch.Generator().manual_seed(1)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
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


def attentions(program: xo.Program) -> Counter[str]:
    return Counter(target_name(node.target) for node in program.nodes())


def check(name: str) -> xo.Program:
    module = shaken(find_architecture(name))
    inputs = module.example_inputs()  # type: ignore[operator]
    wanted = module(**inputs)
    assert all(float(value.double().norm()) > 0 for value in wanted.values())
    program = xo.capture(module, inputs)
    result = xo.Pipeline.recipe("exact").run(program, target="ort-cpu")
    artifact = xo.lower(result.program, target="ort-cpu", measure=False)
    ours = artifact.run(**{key: value.numpy() for key, value in inputs.items()})
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        assert distance(torch.from_numpy(ours[key]), value) <= 1e-4, key
    return result.program


@pytest.mark.parametrize("name", SMALL)
def test_small_architectures(name: str) -> None:
    operators = attentions(check(name))
    assert operators["xf.attention"] == ATTENTIONS.get(name, 0)
    assert not [operator for operator in operators if "scaled_dot_product" in operator]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes(name: str) -> None:
    assert attentions(check(name))["xf.attention"] > 0


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
