"""Routing attention: against loops over clusters, and attention itself where there is one cluster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_formulas import DOUBLE, HEADS, D, E, randn, softmax

from xformopt.kernels.attention import attention
from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.routing_attention import cluster_size

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {"heads": HEADS, "scale": 0.7}
T, C = 11, 4


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(2, T, HEADS * D), randn(2, T, HEADS * D), randn(2, T, HEADS * E), randn(HEADS, C, D)


def padding() -> torch.Tensor:
    """Two sequences: all tokens but the last four, and none."""
    return torch.stack([torch.arange(T) < T - 4, torch.zeros(T, dtype=torch.bool)])


CASES: list[tuple[Any, dict[str, Any]]] = [
    (lambda: qkv(), {}),
    (lambda: qkv(), {"causal": True}),
    (lambda: (*qkv(), padding()), {}),
    (lambda: (*qkv(), padding(), randn(1, HEADS, T, T)), {"causal": True}),
    (lambda: (*qkv(), None, randn(2, 1, T, T)), {}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[str(number) for number in range(len(CASES))])


def normal(row: torch.Tensor) -> torch.Tensor:
    centred = row - row.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def by_loops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    centroids: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    out = torch.zeros(2, T, HEADS * E, dtype=DOUBLE)
    for b in range(2):
        there = [mask is None or bool(mask[b, j]) for j in range(T)]
        for h in range(heads):
            rows, keys = (x[b, :, h * D : (h + 1) * D] for x in (q, k))
            found: dict[int, list[torch.Tensor]] = {i: [] for i in range(T)}
            for centroid in centroids[h]:

                def nearest(x: torch.Tensor, centroid: torch.Tensor = centroid, there: list[bool] = there) -> list[int]:
                    order = [(not there[i], -float(normal(x[i]) @ centroid), i) for i in range(T)]
                    return [i for _, _, i in sorted(order)[:3]]

                asking = nearest(rows)
                asked = asking if causal else nearest(keys)
                for i in asking:
                    seen = [j for j in asked if there[j] and (j <= i or not causal)]
                    if not seen:
                        continue
                    logits = [scale * float(rows[i] @ keys[j]) for j in seen]
                    if bias is not None:
                        pairs = bias.expand(2, heads, T, T)[b, h, i]
                        logits = [x + float(pairs[j]) for x, j in zip(logits, seen, strict=True)]
                    parts = zip(softmax(logits), seen, strict=True)
                    found[i].append(sum(weight * v[b, j, h * E : (h + 1) * E] for weight, j in parts))
            for i, parts in found.items():
                if parts:
                    out[b, i, h * E : (h + 1) * E] = torch.stack(parts).mean(0)
    return out


@every_case
def test_definition_is_the_formula(case: Any) -> None:
    arguments, options = case[0](), {**OPTIONS, **case[1]}
    found = xf.routing_attention(*arguments, **options)
    torch.testing.assert_close(found, by_loops(*arguments, **options), **CLOSE)
    inferred = load_operators()["routing_attention"].infer(*arguments, **options)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (found.shape, found.dtype, found.stride())


def test_some_tokens_are_in_no_cluster_and_get_nothing() -> None:
    q, k, v, _ = qkv()
    alike = randn(HEADS, 1, D).expand(HEADS, C, D)
    found = xf.routing_attention(q, k, v, alike, **OPTIONS).unflatten(-1, (HEADS, E))
    # all clusters take the same three
    assert (found.abs().sum(-1) > 0).sum(1).tolist() == [[3] * HEADS] * 2


def test_cost_is_the_formula_at_a_known_shape() -> None:
    rule = load_operators()["routing_attention"].flops
    inside = C * 3 * 3 * (D + E)
    assert rule(*qkv(), **OPTIONS) == 2 * 2 * HEADS * (inside + 2 * T * C * D)
    assert rule(*qkv(), **OPTIONS, causal=True) == 2 * 2 * HEADS * (inside + T * C * D)


def test_how_many_a_cluster_takes() -> None:
    assert [cluster_size(length, 4) for length in (1, 4, 11, 12)] == [1, 1, 3, 3]


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_is_exact_attention(causal: bool) -> None:
    q, k, v, centroids = qkv()
    mask, bias = torch.arange(T).expand(2, T) >= torch.tensor([[0], [5]]), randn(2, HEADS, T, T)
    found = xf.routing_attention(q, k, v, centroids[:, :1], mask, bias, heads=2, scale=0.7, causal=causal)
    expected = attention(q, k, v, mask, bias, heads=HEADS, kv_heads=HEADS, scale=0.7, causal=causal)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_torch_accepts_the_operator_and_its_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in qkv()[:3])
    centroids, bias, mask = randn(HEADS, C, D), randn(1, HEADS, T, T).requires_grad_(), padding()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(xf.routing_attention, (q, k, v, centroids, mask, bias), OPTIONS, test_utils=checks)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        return xf.routing_attention(q, k, v, centroids, mask, bias, **OPTIONS)

    assert torch.autograd.gradcheck(call, (q, k, v, bias), fast_mode=True)


def test_what_does_not_fit_is_refused() -> None:
    given = [torch.empty(1, 5, 6, device="meta") for _ in range(3)]
    centroids = torch.empty(2, 3, 3, device="meta")
    with pytest.raises(RuntimeError, match="one key for each query"):
        xf.routing_attention(given[0], *(x[:, :4] for x in given[1:]), centroids, **OPTIONS)
    with pytest.raises(RuntimeError, match="those of each head, as wide as its queries"):
        xf.routing_attention(*given, centroids[:1], **OPTIONS)
    with pytest.raises(RuntimeError, match="a cluster at least"):
        xf.routing_attention(*given, centroids[:, :0], **OPTIONS)
