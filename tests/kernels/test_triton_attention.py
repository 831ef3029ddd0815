"""The Triton kernels of attention, under Triton's interpreter, at lengths that fill no block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import assert_kernel, computed, randn, relative

from xformopt.kernels.attention.triton import KERNEL
from xformopt.kernels.definition import xf
from xformopt.kernels.triton_form import load_kernels

HEADS = {"heads": 2, "kv_heads": 2, "scale": 0.3}
# all keys, none at all, every other one
MASK = torch.tensor([[1] * 37, [0] * 37, [1, 0] * 18 + [1]]).bool()
LOWEST = torch.zeros(3, 1, 1, 37).masked_fill(~MASK[:, None, None, :], torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("options", "shapes", "operands"),
    [
        ({}, (37, 37, 24, 24), {}),
        ({"causal": True}, (37, 70, 16, 16), {}),
        ({"causal": True, "window_left": 5}, (70, 70, 16, 16), {}),
        ({"window_left": 4, "window_right": 3}, (70, 170, 16, 16), {}),
        ({"window_left": 40, "window_right": 70}, (70, 170, 16, 16), {}),
        ({"window_right": 3, "causal": True}, (70, 33, 16, 16), {}),
        ({"heads": 4, "kv_heads": 2}, (19, 37, 16, 40), {}),
        ({}, (21, 37, 16, 16), {"key_mask": MASK}),
        ({}, (21, 37, 16, 16), {"key_mask": MASK, "bias": randn(1, 2, 21, 37), "key_log_size": randn(3, 37)}),
        ({"causal": True}, (37, 37, 16, 16), {"bias": randn(3, 1, 1, 37)}),
        ({}, (21, 37, 16, 16), {"bias": LOWEST, "key_log_size": randn(3, 37)}),
        ({}, (21, 37, 16, 16), {"bias": LOWEST.masked_fill(LOWEST < 0, float("-inf"))}),
    ],
    ids=[
        "plain",
        "causal, more keys than queries",
        "causal window",
        "window inside of a block",
        "window over several blocks",
        "queries before the first key",
        "groups, values of another width",
        "key mask",
        "key mask, bias and sizes",
        "bias of keys",
        "lowest number as a mask",
        "minus infinity as a mask",
    ],
)
def test_attention(options: dict[str, Any], shapes: tuple[int, ...], operands: dict[str, Any]) -> None:
    T, S, D, E = shapes
    given = {**HEADS, **options}
    q, k, v = randn(3, T, D * given["heads"]), randn(3, S, D * given["kv_heads"]), randn(3, S, E * given["kv_heads"])
    assert_kernel("attention", q, k, v, **given, **operands)


def test_a_query_without_keys_gets_zeros() -> None:
    q, k, v = randn(3, 21, 32), randn(3, 37, 32), randn(3, 37, 32)
    assert not computed("attention", q, k, v, MASK, **HEADS)[1].any()


@pytest.mark.parametrize(
    ("options", "T", "operands"),
    [
        ({}, 1, {}),
        ({"heads": 8}, 1, {"key_mask": True}),
        ({"heads": 4, "causal": True}, 3, {}),
        ({"heads": 4, "causal": True, "window_left": 40}, 3, {"key_mask": True}),
        ({"causal": True}, 2, {"bias": randn(1, 2, 2, 530), "key_log_size": randn(3, 530)}),
    ],
    ids=["one query", "groups, mask", "several queries", "window", "bias and sizes"],
)
def test_few_queries_on_many_keys(options: dict[str, Any], T: int, operands: dict[str, Any]) -> None:
    """Keys in two parts; a sequence whose keys are all in one of them, and one without any."""
    given = {**HEADS, **options}
    mask = torch.ones(3, 530, dtype=torch.bool)
    mask[1, :525], mask[2] = False, False
    if operands.get("key_mask"):
        operands = {**operands, "key_mask": mask}
    q, k, v = randn(3, T, 16 * given["heads"]), randn(3, 530, 16 * 2), randn(3, 530, 24 * 2)
    assert len(KERNEL.plan(q, k, v, **given, **operands).launches) == 2
    ours = assert_kernel("attention", q, k, v, **given, **operands)
    if operands.get("key_mask") is not None:
        assert not ours[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_kernel("attention", *(randn(2, 137, 64, dtype=dtype) for _ in range(3)), **HEADS)


def test_parts_of_one_tensor_are_read_in_place() -> None:
    q, k, v = randn(2, 37, 96).split(32, -1)
    assert not q.is_contiguous()
    (launch,) = KERNEL.plan(q, k, v, **HEADS).launches
    assert all(launch.arguments[name] is x for name, x in (("q", q), ("k", k), ("v", v)))
    assert_kernel("attention", q, k, v, **HEADS)


def test_channels_that_are_not_adjacent_are_copied() -> None:
    q, k, v = (randn(2, 32, 37).transpose(1, 2) for _ in range(3))
    assert_kernel("attention", q, k, v, **HEADS)


def test_the_same_bits_from_run_to_run() -> None:
    q, k, v = (randn(2, 70, 32) for _ in range(3))
    assert torch.equal(computed("attention", q, k, v, **HEADS), computed("attention", q, k, v, **HEADS))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("has_keys", [False, True])
def test_packed_sequences(causal: bool, has_keys: bool) -> None:
    """One longer than a block, one of a single token, and empty ones, at the end too."""
    offsets = torch.tensor([0, 0, 70, 70, 71, 90, 90])
    keys = torch.tensor([0, 66, 0, 0, 19, 0]) if has_keys else None
    options = {"heads": 4, "kv_heads": 2, "scale": 0.3, "causal": causal}
    q, k, v = randn(1, 90, 64), randn(1, 90, 32), randn(1, 90, 48)
    ours = assert_kernel("attention_packed", q, k, v, offsets, keys, **options)
    if has_keys:
        assert not ours[0, 70].any()


def test_more_packed_sequences_than_are_looked_up_at_once() -> None:
    offsets = torch.tensor([0] * 100 + [40] * 45 + [45])
    q, k, v = (randn(1, 45, 16) for _ in range(3))
    assert_kernel("attention_packed", q, k, v, offsets, heads=1, kv_heads=1, scale=0.25)


def test_a_pack_of_nothing() -> None:
    empty = torch.empty(1, 0, 32)
    assert computed("attention_packed", empty, empty, empty, torch.tensor([0, 0]), **HEADS).shape == (1, 0, 32)


def test_what_is_refused_is_said() -> None:
    q = randn(1, 3, 2 * 320)
    assert KERNEL.accepts(q, q, q, **HEADS) == "its heads are 320 wide, more than 256"
    assert "torch.float64" in str(KERNEL.accepts(*(x.double() for x in (q, q, q)), **HEADS))
    assert "torch.float16" in str(KERNEL.accepts(q, q.half(), q, **HEADS))


def test_the_torch_operator_computes_it() -> None:
    load_kernels()
    q, k, v = (randn(2, 37, 32) for _ in range(3))
    ours = torch.ops.xf_triton.attention(q, k, v, MASK[:2], causal=True, **HEADS)
    assert relative(ours, xf.attention(q, k, v, MASK[:2], causal=True, **HEADS)) < 1e-6
    torch.library.opcheck(
        torch.ops.xf_triton.attention.default, (q, k, v), HEADS, test_utils=("test_schema", "test_faketensor")
    )
