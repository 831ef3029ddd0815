"""The Triton kernel of entmax attention, under Triton's interpreter: thresholds, and blocks that are left out."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn

from xformopt.kernels.triton_form import load_kernels

OPTIONS = {"heads": 2, "scale": 0.6}


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("causal", [False, True])
def test_entmax_attention(alpha: float, causal: bool) -> None:
    keys = 71 if causal else 90
    q, k, v = randn(2, 71, 2 * 20), randn(2, keys, 2 * 20), randn(2, keys, 2 * 24)
    mask = torch.arange(keys) < torch.tensor([[keys], [20]])
    assert_kernel("entmax_attention", q, k, v, mask, alpha=alpha, causal=causal, **OPTIONS)


def test_queries_that_see_no_key_get_zeros() -> None:
    q, k, v = (randn(2, 35, 32) for _ in range(3))
    mask = torch.arange(35) >= torch.tensor([[5], [35]])
    ours = assert_kernel("entmax_attention", q, k, v, mask, causal=True, **OPTIONS)
    assert not ours[0, :5].any()
    assert not ours[1].any()


def focused(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose products are large near the diagonal alone, so that far blocks have no weight."""
    place = torch.arange(tokens).float() / 30
    waves = torch.stack([place.cos(), place.sin(), (place / 4).cos(), (place / 4).sin()], -1)
    return waves.repeat(1, 4)[None] * 3, waves.repeat(1, 4)[None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_no_weight_are_not_read(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in focused(300))
    v = randn(1, 300, 16, dtype=dtype)
    options = {"heads": 1, "scale": 0.3}
    expected = assert_kernel("entmax_attention", q[:, :50], k, v, **options)
    v[:, 192:] = float("nan")
    assert torch.equal(computed("entmax_attention", q[:, :50], k, v, **options), expected)


def test_one_key_has_all_the_weight() -> None:
    q, v = randn(1, 33, 16), randn(1, 1, 16)
    ours = computed("entmax_attention", q, q[:, :1], v, heads=1, scale=1.0)
    torch.testing.assert_close(ours, v.expand(1, 33, 16))


def test_equal_scores_share_the_weight() -> None:
    v = randn(1, 77, 16)
    ours = computed("entmax_attention", torch.zeros(1, 3, 16), randn(1, 77, 16), v, heads=1, scale=1.0)
    torch.testing.assert_close(ours, v.mean(1, keepdim=True).expand(1, 3, 16))


def test_half_precision() -> None:
    q, k, v = (randn(1, 40, 32, dtype=torch.bfloat16) for _ in range(3))
    assert_kernel("entmax_attention", q, k, v, causal=True, **OPTIONS)


def test_what_is_refused_is_said() -> None:
    accepts, wide = load_kernels()["entmax_attention"].accepts, randn(1, 3, 600)
    assert "300 wide" in str(accepts(wide, wide, wide, heads=2, scale=1.0))
    assert "torch.float64" in str(accepts(*[wide.double()] * 3, heads=4, scale=1.0))
