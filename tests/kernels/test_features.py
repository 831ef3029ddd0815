"""Feature maps of linear attention with a projection: random and learned."""

from __future__ import annotations

import math

import pytest
import torch

from xformopt.kernels import linear_attention as linear
from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.features import feature_map

DOUBLE = torch.float64
HEADS, D, E, M = 2, 3, 5, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
WIDTHS = {"positive": M, "hedgehog": 2 * M}
every_feature = pytest.mark.parametrize("feature", WIDTHS)


def arguments(T: int) -> tuple[torch.Tensor, ...]:
    shapes = ((2, T, HEADS * D), (2, T, HEADS * D), (2, T, HEADS * E), (HEADS, D, M))
    return tuple(torch.randn(*shape, dtype=DOUBLE) for shape in shapes)


def by_loops(x: list[float], w: list[list[float]], feature: str) -> list[float]:
    projected = [sum(a * row[m] for a, row in zip(x, w, strict=True)) for m in range(M)]
    if feature == "positive":
        return [math.exp(p - sum(a * a for a in x) / 2) / math.sqrt(M) for p in projected]
    halves = []
    for sign in (1, -1):
        exponentials = [math.exp(sign * p) for p in projected]
        halves += [value / sum(exponentials) for value in exponentials]
    return halves


@every_feature
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_products_of_features(feature: str, causal: bool) -> None:
    q, k, v, w = arguments(5)
    mask = torch.tensor([[False, True, True, True, True], [False] * 5])
    found = xf.linear_attention(q, k, v, mask, w, heads=HEADS, feature=feature, causal=causal)
    expected = torch.zeros_like(found)
    for b in range(2):
        for h in range(HEADS):
            phi = [
                [by_loops(x[b, t, h * D : (h + 1) * D].tolist(), w[h].tolist(), feature) for t in range(5)]
                for x in (q, k)
            ]
            for i in range(5):
                keys = [j for j in range(5) if mask[b, j] and (j <= i or not causal)]
                weights = [sum(x * y for x, y in zip(phi[0][i], phi[1][j], strict=True)) for j in keys]
                for j, weight in zip(keys, weights, strict=True):
                    expected[b, i, h * E : (h + 1) * E] += weight / (sum(weights) + 1e-6) * v[b, j, h * E : (h + 1) * E]
    torch.testing.assert_close(found, expected, **CLOSE)


@every_feature
@pytest.mark.parametrize("T", [1, 4, 70])
def test_chunks_masks_and_steps_are_one_function(feature: str, T: int) -> None:
    q, k, v, w = arguments(T)
    options = {"heads": HEADS, "feature": feature}
    state = torch.zeros(2, HEADS, WIDTHS[feature], E + 1, dtype=DOUBLE)
    outputs = []
    for t in range(T):
        state, output = linear.linear_attention_step(state, q[:, t], k[:, t], v[:, t], w, **options)
        outputs.append(output)
    expected = torch.stack(outputs, 1)
    torch.testing.assert_close(xf.linear_attention(q, k, v, None, w, **options, causal=True), expected, **CLOSE)
    chunked = linear.linear_attention(q, k, v, None, w, **options, causal=True, chunk=4)
    torch.testing.assert_close(chunked, expected, **CLOSE)
    masked = linear.linear_attention_masked(q, k, v, None, w, **options, causal=True)
    torch.testing.assert_close(masked, expected, **CLOSE)


@every_feature
def test_torch_accepts_the_operator(feature: str) -> None:
    q, k, v, w = (x.requires_grad_() for x in arguments(5))
    operator = load_operators()["linear_attention"]
    options = {"heads": HEADS, "feature": feature, "causal": True}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.overload, (q, k, v, None, w), options, test_utils=checks)
    assert torch.autograd.gradcheck(
        lambda *x: xf.linear_attention(x[0], x[1], x[2], None, x[3], **options), (q, k, v, w), fast_mode=True
    )
    F = WIDTHS[feature]
    projections = 2 * 2 * 2 * 5 * HEADS * D * M
    assert operator.flops(q, k, v, None, w, **options) == projections + 2 * 2 * 64 * HEADS * (64 * (F + E) + 2 * F * E)


def test_products_of_many_random_features_are_those_of_softmax() -> None:
    q, k = torch.randn(2, 1, 1, 3, D, dtype=DOUBLE) * 0.5
    w = torch.randn(1, D, 200_000, dtype=DOUBLE)
    products = feature_map(q, "positive", w) @ feature_map(k, "positive", w).transpose(-1, -2)
    torch.testing.assert_close(products, (q @ k.transpose(-1, -2)).exp(), rtol=0.05, atol=0)
