"""Hugging Face architectures: one ``xf.attention`` for each layer, masks understood, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from family import Family
from required_families import REQUIRED
from torch.utils import _pytree as pytree
from wider_families import WIDER

CASES = [(family, how) for family in REQUIRED for how in family.only]
MORE = [(family, how) for family in WIDER for how in family.only]
# read by the same rules as others of the list
SLOW = {("modernbert", "sdpa"), ("qwen2-window", "eager"), ("qwen3", "sdpa"), ("roberta", "sdpa")}
PARTS = {
    "bert": {"xf.linear": 13, "xf.layer_norm": 5, "xf.activation": 2},
    "t5-encoder": {"xf.rms_norm": 5, "xf.linear": 12, "xf.activation": 2},
    "vit": {"xf.patch_embedding": 1, "xf.layer_norm": 5, "xf.linear": 13},
    "qwen3": {"xf.rms_norm": 9, "xf.rope": 4, "xf.glu": 2, "xf.linear": 15},
    "modernbert": {"xf.layer_norm": 9, "xf.rope": 8, "xf.glu": 4},
}
# features are computed by known operators alone
WRITTEN_OUT = {"aten.mean.dim", "aten.rsqrt", "aten.var.correction", "aten.erf", "aten.sigmoid"}
Check = Callable[[torch.Tensor, torch.Tensor], float]


def ids(cases: list[tuple[Family, str]]) -> list[str]:
    return [f"{family.name}-{how}" for family, how in cases]


def points(family: Family) -> Iterator[tuple[int, int, str]]:
    """Yield (batch, length, padding side); those with a fixed length need only the batches."""
    if not varies(family):
        yield from ((1, 9, "none"), (3, 9, "none"))
        return
    for batch in (1, 3):
        yield from ((batch, length, "none") for length in (1, 7, family.longest))
        yield from ((batch, length, side) for length in (7, family.longest) for side in ("left", "right"))


def varies(family: Family) -> bool:
    one, other = (family.inputs(1, length, "none") for length in (7, 8))
    return any(value.shape != other[name].shape for name, value in one.items())


def check_family(family: Family, how: str, lift: Any, distance: Check, valid: Any) -> Any:
    model = family.make(how)
    lifted = lift(model, None, **family.inputs(2, 9, "right"))
    for batch, length, side in points(family):
        inputs = family.inputs(batch, length, side)
        ours = lifted.program.run(inputs)
        with torch.no_grad():
            leaves = [leaf for leaf in pytree.tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor)]
        for spec, theirs in zip(lifted.program.outputs, leaves, strict=True):
            keep = valid(spec, inputs, theirs)
            where = f"{spec.name} at batch {batch}, length {length}, padding {side}"
            assert distance(ours[spec.name][keep], theirs[keep]) <= 1e-5, where
    return lifted


def check_masks(family: Family, lifted: Any) -> None:
    count = lifted.operators["xf.attention"]
    wanted = family.expect if isinstance(family.expect, tuple) else (family.expect,) * count
    for position, expected in enumerate(wanted):
        found: Mapping[str, Any] = lifted.attributes("xf.attention", position)
        assert {name: found[name] for name in expected} == dict(expected), f"attention {position}"
        if wanted and family.inputs.__name__ in ("text", "ended_text"):
            assert lifted.operand("xf.attention", "key_mask", position) is not None


@pytest.mark.parametrize(
    ("family", "how"),
    [pytest.param(*case, marks=pytest.mark.slow if (case[0].name, case[1]) in SLOW else ()) for case in CASES],
    ids=ids(CASES),
)
def test_every_layer_is_one_attention(family: Family, how: str, lift: Any, distance: Check, valid: Any) -> None:
    lifted = check_family(family, how, lift, distance, valid)
    assert lifted.operators["xf.attention"] == family.attentions
    left = [name for name in lifted.operators if "softmax" in name or "scaled_dot_product" in name]
    assert left == []
    assert not set(lifted.operators) & WRITTEN_OUT
    expected = PARTS.get(family.name, {})
    assert {operator: lifted.operators[operator] for operator in expected} == expected
    check_masks(family, lifted)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), MORE, ids=ids(MORE))
def test_wider_families(family: Family, how: str, lift: Any, distance: Check, valid: Any) -> None:
    lifted = check_family(family, how, lift, distance, valid)
    assert lifted.operators["xf.attention"] == family.attentions
    if family.expect:
        check_masks(family, lifted)
