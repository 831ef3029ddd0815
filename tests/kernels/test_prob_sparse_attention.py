"""ProbSparse attention: against loops over queries and keys, and attention itself where every query attends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_formulas import DOUBLE, HEADS, D, E, randn, softmax

from xformopt.kernels.attention import attention
from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.prob_sparse_attention import active_queries

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {"heads": HEADS, "scale": 0.7, "factor": 1.5}
T, SAMPLE = 11, torch.tensor([0.05, 0.3, 0.95, 0.62])
PLACES = (0, 3, 10, 6)


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(2, T, HEADS * D), randn(2, T, HEADS * D), randn(2, T, HEADS * E)


def padding() -> torch.Tensor:
    """Two sequences: all tokens but the last four, and none."""
    return torch.stack([torch.arange(T) < T - 4, torch.zeros(T, dtype=torch.bool)])


CASES: list[tuple[Any, dict[str, Any]]] = [
    (lambda: (*qkv(), SAMPLE), {}),
    (lambda: (*qkv(), SAMPLE), {"causal": True}),
    (lambda: (*qkv(), SAMPLE, padding()), {"factor": 0.1}),
    (lambda: (*qkv(), SAMPLE, padding(), randn(1, HEADS, T, T)), {"causal": True}),
    (lambda: (*qkv(), SAMPLE, None, randn(2, 1, T, T)), {}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[str(number) for number in range(len(CASES))])


def by_loops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sample: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    factor: float,
    causal: bool = False,
) -> torch.Tensor:
    assert [int(x * T) for x in sample.tolist()] == list(PLACES)
    out = torch.zeros(2, T, HEADS * E, dtype=DOUBLE)
    for b in range(2):
        for h in range(heads):
            logits = scale * q[b, :, h * D : (h + 1) * D] @ k[b, :, h * D : (h + 1) * D].t()
            if bias is not None:
                logits = logits + bias.expand(2, heads, T, T)[b, h]
            there = [mask is None or bool(mask[b, j]) for j in range(T)]
            rated = []
            for i in range(T):
                seen = [float(logits[i, j]) for j in PLACES if there[j]]
                rating = max(seen) - sum(seen) / len(seen) if seen else 0.0
                rated.append((not there[i], -rating, i))
            active = {i for _, _, i in sorted(rated)[: math.ceil(factor * math.log(T))]}
            for i in range(T):
                keys = [j for j in range(T) if there[j] and (j <= i or not causal)]
                weights = (
                    softmax([float(logits[i, j]) for j in keys]) if i in active else [1 / max(len(keys), 1)] * len(keys)
                )
                for j, weight in zip(keys, weights, strict=True):
                    out[b, i, h * E : (h + 1) * E] += weight * v[b, j, h * E : (h + 1) * E]
    return out


@every_case
def test_definition_is_the_formula(case: Any) -> None:
    arguments, options = case[0](), {**OPTIONS, **case[1]}
    found = xf.prob_sparse_attention(*arguments, **options)
    torch.testing.assert_close(found, by_loops(*arguments, **options), **CLOSE)
    inferred = load_operators()["prob_sparse_attention"].infer(*arguments, **options)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (found.shape, found.dtype, found.stride())


def test_cost_is_the_formula_at_a_known_shape() -> None:
    found = load_operators()["prob_sparse_attention"].flops(*qkv(), SAMPLE, **OPTIONS)
    assert found == 2 * 2 * HEADS * (4 * T * (D + E) + T * 4 * D)


def test_how_many_queries_attend() -> None:
    assert [active_queries(T, 5.0) for T in (1, 2, 96, 512)] == [1, 2, 23, 32]
    assert active_queries(512, 0.001) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_all_queries_are_exact_attention(causal: bool) -> None:
    q, k, v = qkv()
    mask, bias = torch.arange(T).expand(2, T) >= torch.tensor([[0], [5]]), randn(2, HEADS, T, T)
    found = xf.prob_sparse_attention(q, k, v, SAMPLE, mask, bias, heads=2, scale=0.7, factor=9.0, causal=causal)
    expected = attention(q, k, v, mask, bias, heads=HEADS, kv_heads=HEADS, scale=0.7, causal=causal)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_torch_accepts_the_operator_and_its_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    bias, mask = randn(1, HEADS, T, T).requires_grad_(), padding()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(xf.prob_sparse_attention, (q, k, v, SAMPLE, mask, bias), OPTIONS, test_utils=checks)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        return xf.prob_sparse_attention(q, k, v, SAMPLE, mask, bias, **OPTIONS)

    assert torch.autograd.gradcheck(call, (q, k, v, bias), fast_mode=True)


def test_what_does_not_fit_is_refused() -> None:
    given = [torch.empty(1, 5, 6, device="meta") for _ in range(3)]
    sample = torch.empty(2, device="meta")
    with pytest.raises(RuntimeError, match="one key for each query"):
        xf.prob_sparse_attention(given[0], *(x[:, :4] for x in given[1:]), sample, **OPTIONS)
    with pytest.raises(RuntimeError, match="factor must be positive"):
        xf.prob_sparse_attention(*given, sample, **{**OPTIONS, "factor": 0.0})
    with pytest.raises(RuntimeError, match="a list of places"):
        xf.prob_sparse_attention(*given, sample[:, None], **OPTIONS)
