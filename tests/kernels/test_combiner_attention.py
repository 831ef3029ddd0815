"""Combiner attention: against its distribution written out key by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_formulas import DOUBLE, HEADS, D, E, randn, softmax

from xformopt.kernels.attention import attention
from xformopt.kernels.definition import load_operators, xf

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {"heads": HEADS, "scale": 0.7, "block": 3}
T = 11


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(2, T, HEADS * D), randn(2, T, HEADS * D), randn(2, T, HEADS * E)


def padding() -> torch.Tensor:
    """Two sequences: all tokens but the last four, and none."""
    return torch.stack([torch.arange(T) < T - 4, torch.zeros(T, dtype=torch.bool)])


def weights_of(
    q: torch.Tensor, k: torch.Tensor, there: list[int], i: int, block: int, scale: float, causal: bool
) -> dict[int, float]:
    """Return p(j | i) of one head, ``[T, D]``, for the keys that are there."""
    own = [j for j in there if j // block == i // block and (j <= i or not causal)]
    regions = sorted({j // block for j in there} - {i // block})
    if causal:
        regions = [R for R in regions if i // block > R]
    inside = {R: [j for j in there if j // block == R] for R in regions}
    pooled = {R: (q[inside[R]].amax(0), k[inside[R]].amax(0)) for R in regions}
    logits = [scale * float(q[i] @ k[j]) for j in own] + [scale * float(q[i] @ pooled[R][1]) for R in regions]
    if not logits:
        return {}
    shares = softmax(logits)
    found = dict(zip(own, shares, strict=False))
    for R, share in zip(regions, shares[len(own) :], strict=True):
        parts = softmax([scale * float(pooled[R][0] @ k[j]) for j in inside[R]])
        found |= {j: share * part for j, part in zip(inside[R], parts, strict=True)}
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, padding()])
def test_definition_is_the_formula(causal: bool, mask: torch.Tensor | None) -> None:
    q, k, v = qkv()
    found = xf.combiner_attention(q, k, v, mask, **OPTIONS, causal=causal)
    expected = torch.zeros(2, T, HEADS * E, dtype=DOUBLE)
    for b in range(2):
        there = [j for j in range(T) if mask is None or bool(mask[b, j])]
        for h in range(HEADS):
            one, two = (x[b, :, h * D : (h + 1) * D] for x in (q, k))
            for i in range(T):
                weights = weights_of(one, two, there, i, 3, 0.7, causal)
                assert not weights or abs(sum(weights.values()) - 1) < 1e-9
                for j, weight in weights.items():
                    expected[b, i, h * E : (h + 1) * E] += weight * v[b, j, h * E : (h + 1) * E]
    torch.testing.assert_close(found, expected, **CLOSE)
    inferred = load_operators()["combiner_attention"].infer(q, k, v, mask, **OPTIONS, causal=causal)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (found.shape, found.dtype, found.stride())


@pytest.mark.parametrize("causal", [False, True])
def test_one_block_is_attention_itself(causal: bool) -> None:
    q, k, v = qkv()
    found = xf.combiner_attention(q, k, v, padding(), heads=HEADS, scale=0.7, block=T, causal=causal)
    expected = attention(q, k, v, padding(), heads=HEADS, kv_heads=HEADS, scale=0.7, causal=causal)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_cost_is_the_formula_at_a_known_shape() -> None:
    found = load_operators()["combiner_attention"].flops(*qkv(), **OPTIONS)
    assert found == 2 * 2 * HEADS * (D + E) * (12 * 3 + 12 * 4 + 12)


def test_torch_accepts_the_operator_and_its_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(xf.combiner_attention, (q, k, v, padding()), OPTIONS, test_utils=checks)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return xf.combiner_attention(q, k, v, padding(), **OPTIONS)

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)


def test_what_does_not_fit_is_refused() -> None:
    given = [torch.empty(1, 5, 6, device="meta") for _ in range(3)]
    with pytest.raises(RuntimeError, match="one key for each query"):
        xf.combiner_attention(given[0], *(x[:, :4] for x in given[1:]), **OPTIONS)
    with pytest.raises(RuntimeError, match="at least one token"):
        xf.combiner_attention(*given, **{**OPTIONS, "block": 0})
