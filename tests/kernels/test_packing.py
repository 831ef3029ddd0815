"""Packing, unpacking and attention inside packed sequences: against loops over numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xformopt.kernels.definition import load_operators, xf
from xformopt.program import Program

DOUBLE = torch.float64
# a whole sequence, one with a hole, one of padding alone, one padded on the left
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()
PLACES = [0, 1, 2, 3, 4, 6, 14, 15]
OFFSETS = [0, 4, 6, 6, 8]
HEADS = {"heads": 2, "kv_heads": 1, "scale": 0.6}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(sum(shape)))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: list[int], *, causal: bool) -> torch.Tensor:
    """Two query heads on one head of keys, number by number."""
    found = torch.zeros(1, q.shape[1], 2 * v.shape[2], dtype=DOUBLE)
    for start, end, count in zip(OFFSETS, OFFSETS[1:], counts, strict=False):
        for i in range(start, end):
            for head in range(2):
                seen = [j for j in range(start, start + count) if j <= i or not causal]
                query = q[0, i, 3 * head : 3 * head + 3]
                weights = [math.exp(0.6 * float(query @ k[0, j])) for j in seen]
                for j, weight in zip(seen, weights, strict=True):
                    found[0, i, 2 * head : 2 * head + 2] += v[0, j] * weight / sum(weights)
    return found


def test_a_plan_lists_tokens_sequence_after_sequence() -> None:
    places, offsets, keys = xf.plan_packing(MASK)
    assert places.tolist() == PLACES
    assert offsets.tolist() == OFFSETS
    assert keys.tolist() == [4, 2, 0, 2]


def test_guests_stand_behind_the_tokens_of_their_sequence() -> None:
    places, offsets, keys = xf.plan_packing(MASK, front=2)
    assert places.tolist() == [0, 1, 2, 3, 4, 6, 5, 8, 9, 14, 15, 12, 13]
    assert offsets.tolist() == [0, 4, 7, 9, 13]
    assert keys.tolist() == [4, 2, 0, 2]


def test_unpacking_gives_every_token_its_place_and_padding_zeros() -> None:
    x, places = randn(4, 4, 3), torch.tensor(PLACES)
    packed = xf.pack_tokens(x, places)
    assert torch.equal(packed[0], x.flatten(0, 1)[PLACES])
    assert torch.equal(xf.unpack_tokens(packed, places, MASK), x * MASK.unsqueeze(2))


def test_what_is_the_same_in_every_sequence_is_repeated() -> None:
    x = randn(1, 4, 3)
    assert torch.equal(xf.pack_tokens(x, torch.tensor(PLACES)), xf.pack_tokens(x.repeat(4, 1, 1), torch.tensor(PLACES)))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_stays_inside_its_sequence(causal: bool) -> None:
    q, k, v = randn(1, 8, 6), randn(1, 8, 3), randn(1, 8, 2)
    ours = xf.attention_packed(q, k, v, torch.tensor(OFFSETS), causal=causal, **HEADS)
    torch.testing.assert_close(ours, attend(q, k, v, [4, 2, 0, 2], causal=causal), rtol=1e-12, atol=1e-12)


def test_tokens_that_are_no_keys_ask_and_a_sequence_without_keys_gets_zeros() -> None:
    q, k, v = randn(1, 8, 6), randn(1, 8, 3), randn(1, 8, 2)
    ours = xf.attention_packed(q, k, v, torch.tensor(OFFSETS), torch.tensor([3, 0, 0, 2]), **HEADS)
    torch.testing.assert_close(ours, attend(q, k, v, [3, 0, 0, 2], causal=False), rtol=1e-12, atol=1e-12)
    assert not ours[0, 4:6].any()


def test_costs() -> None:
    q, k, v, offsets = randn(1, 8, 6), randn(1, 8, 3), randn(1, 8, 2), torch.tensor(OFFSETS)
    operators = load_operators()
    # as if all four sequences had two tokens: 2 x 16 pairs x (6 for the logits + 4 for the values)
    assert operators["attention_packed"].flops(q, k, v, offsets, **HEADS) == 2 * 16 * 10
    assert operators["plan_packing"].flops(MASK) == 0
    assert operators["pack_tokens"].flops(v, offsets) == operators["unpack_tokens"].flops(v, offsets, MASK) == 0


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("plan_packing", (MASK,), {"front": 1}),
        ("pack_tokens", (randn(4, 4, 3).requires_grad_(), torch.tensor(PLACES)), {}),
        ("unpack_tokens", (randn(1, 8, 3).requires_grad_(), torch.tensor(PLACES), MASK), {}),
        (
            "attention_packed",
            (*(randn(1, 8, n).requires_grad_() for n in (6, 3, 2)), torch.tensor(OFFSETS)),
            {**HEADS, "causal": True},
        ),
    ],
)
def test_torch_accepts_the_operators(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    overload = load_operators()[name].overload
    torch.library.opcheck(overload, arguments, options, test_utils=("test_schema", "test_faketensor"))
    if name != "plan_packing":
        inputs = [a for a in arguments if a.is_floating_point()]
        rest = arguments[len(inputs) :]
        assert torch.autograd.gradcheck(lambda *x: overload(*x, *rest, **options), inputs, fast_mode=True)


def test_sizes_that_depend_on_data_keep_their_name() -> None:
    text = """
    program "m" target
    dim batch in [1, inf]
    dim length in [1, 64]
    input %x: f32[batch,length,8]
    input %keep: bool[batch,length]
    %plan: (i64[u0], i64[batch+1], i64[batch]) = xf.plan_packing(%keep)
    %places: i64[u0] = size.getitem(%plan, 0)
    %p: f32[1,u0,8] = xf.pack_tokens(%x, %places)
    %y: f32[batch,length,8] = xf.unpack_tokens(%p, %places, %keep)
    return y=%y
    """
    program = Program.parse(text)
    assert str(Program.parse(str(program))) == str(program)
    assert (
        program.dims.evaluate(program.dims.shape(program.results[0].args[0].meta["val"])[1], {"batch": 3, "length": 5})
        == 15
    )  # type: ignore[union-attr]
    x = torch.randn(2, 5, 8)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(program.run({"x": x, "keep": keep})["y"], x * keep.unsqueeze(2))
