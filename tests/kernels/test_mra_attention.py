"""Multi-resolution attention: against loops over keys, and exact attention where every block is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_formulas import HEADS, D, E, multi_resolution, randn

from xformopt.kernels.attention import attention
from xformopt.kernels.definition import load_operators, xf

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {"heads": HEADS, "scale": 0.7, "block": 3}
PAIRS = 2 * 2 * HEADS * (D + E)


def qkv(T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(2, T, HEADS * D), randn(2, T, HEADS * D), randn(2, T, HEADS * E)


def padding(T: int) -> torch.Tensor:
    """Two sequences: all tokens but the last four, and none."""
    return torch.stack([torch.arange(T) < T - 4, torch.zeros(T, dtype=torch.bool)])


# arguments, options, and how many products of blocks there are, of all pairs and of means
CASES: list[tuple[Any, dict[str, Any], int]] = [
    (lambda: qkv(11), {"keep": 0.4}, 7 * 9 + 16),
    (lambda: qkv(11), {"keep": 0.1, "causal": True}, 4 * 9 + 16),
    (lambda: (*qkv(11), padding(11)), {"keep": 0.4, "causal": True}, 4 * 9 + 16),
    (lambda: (*qkv(11), padding(11)), {"keep": 0.6}, 10 * 9 + 16),
    (lambda: (*qkv(11), padding(11), randn(1, HEADS, 11, 11)), {"keep": 0.4}, 7 * 9 + 16),
    (lambda: (*qkv(11), None, randn(1, 1, 11, 11)), {"keep": 0.6, "causal": True}, 6 * 9 + 16),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[str(number) for number in range(len(CASES))])


@every_case
@pytest.mark.parametrize("coarse", [True, False])
def test_definition_is_the_formula(case: Any, coarse: bool) -> None:
    arguments, options = case[0](), {**OPTIONS, **case[1], "coarse": coarse}
    found = xf.mra_attention(*arguments, **options)
    expected = multi_resolution(*arguments, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    inferred = load_operators()["mra_attention"].infer(*arguments, **options)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (found.shape, found.dtype, found.stride())


@every_case
def test_cost_is_the_formula_at_a_known_shape(case: Any) -> None:
    assert load_operators()["mra_attention"].flops(*case[0](), **OPTIONS, **case[1]) == PAIRS * case[2]


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_exact_attention(causal: bool) -> None:
    q, k, v = qkv(11)
    mask, bias = torch.arange(11).expand(2, 11) >= torch.tensor([[0], [5]]), randn(2, HEADS, 11, 11)
    found = xf.mra_attention(q, k, v, mask, bias, **OPTIONS, keep=1.0, causal=causal)
    expected = attention(q, k, v, mask, bias, heads=HEADS, kv_heads=HEADS, scale=0.7, causal=causal)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_torch_accepts_the_operator_and_its_gradient() -> None:
    arguments = (*(x.requires_grad_() for x in qkv(7)), padding(7), randn(1, HEADS, 7, 7).requires_grad_())
    options = {**OPTIONS, "keep": 0.6}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(xf.mra_attention, arguments, options, test_utils=checks)
    q, k, v, mask, bias = arguments

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        return xf.mra_attention(q, k, v, mask, bias, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, bias), fast_mode=True)


def test_large_logits_stay_finite() -> None:
    q, k, v = (x.float() for x in qkv(11))
    found = xf.mra_attention(q * 1e3, k * 1e3, v, **OPTIONS, keep=0.4)
    assert bool(found.isfinite().all())
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "share of blocks must be above 0"),
        ({"block": 0}, "at least one token"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = [torch.empty(1, 5, 6, device="meta") for _ in range(3)]
    with pytest.raises(RuntimeError, match=message):
        xf.mra_attention(*given, **{**OPTIONS, "keep": 0.5, **change})
    with pytest.raises(RuntimeError, match="one key for each query"):
        xf.mra_attention(given[0], *(x[:, :4] for x in given[1:]), **OPTIONS, keep=0.5)
