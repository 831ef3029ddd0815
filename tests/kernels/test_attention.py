"""``xf.attention`` against explicit loops over batch, heads and queries in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xformopt.kernels.attention import attention, visible_keys
from xformopt.kernels.definition import load_operators, xf


def by_loops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_log_size: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> torch.Tensor:
    """One query of one head at a time, in float64, with the softmax written out."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    D, E = q.shape[2] // heads, v.shape[2] // kv_heads
    out = torch.zeros(B, T, heads * E, dtype=torch.float64)
    for b in range(B):
        for h in range(heads):
            g = h * kv_heads // heads
            for t in range(T):
                at = t + S - T
                seen = [
                    s
                    for s in range(S)
                    if (key_mask is None or key_mask[b, s])
                    and (not causal or s <= at)
                    and (window_left < 0 or s >= at - window_left)
                    and (window_right < 0 or s <= at + window_right)
                ]
                weights = []
                for s in seen:
                    query, key = q[b, t, h * D : (h + 1) * D].double(), k[b, s, g * D : (g + 1) * D].double()
                    logit = scale * float(query @ key)
                    if bias is not None:
                        logit += float(bias.expand(B, heads, T, S)[b, h, t, s])
                    if key_log_size is not None:
                        logit += float(key_log_size[b, s])
                    weights.append(math.exp(logit))
                for s, weight in zip(seen, weights, strict=True):
                    value = v[b, s, g * E : (g + 1) * E].double()
                    out[b, t, h * E : (h + 1) * E] += weight / sum(weights) * value
    return out


def tensors(
    B: int = 2, T: int = 7, S: int = 7, heads: int = 4, kv_heads: int = 4, D: int = 3, E: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, T, heads * D), torch.randn(B, S, kv_heads * D), torch.randn(B, S, kv_heads * E)


def some_keys(B: int, S: int) -> torch.Tensor:
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, : S // 2] = False
    mask[-1, S - 2 :] = False
    return mask


CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({}, {}),
    "one head": ({"heads": 1, "kv_heads": 1}, {}),
    "values wider than keys": ({"E": 5}, {}),
    "cross": ({"T": 5, "S": 9}, {}),
    "grouped": ({"kv_heads": 2}, {}),
    "multi-query": ({"kv_heads": 1}, {"causal": True}),
    "causal": ({}, {"causal": True}),
    "causal, more keys": ({"T": 3, "S": 8}, {"causal": True}),
    "causal, fewer keys": ({"T": 8, "S": 3}, {"causal": True}),
    "window": ({"T": 9, "S": 9}, {"window_left": 2, "window_right": 3}),
    "window of the diagonal": ({}, {"window_left": 0, "window_right": 0}),
    "causal window": ({"T": 9, "S": 9}, {"causal": True, "window_left": 2}),
    "window, more keys": ({"T": 4, "S": 11}, {"causal": True, "window_left": 3}),
    "single query": ({"T": 1, "S": 1}, {"causal": True}),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "some keys"])
@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES.keys())
def test_equals_the_loops(sizes: dict[str, int], options: dict[str, Any], masked: bool) -> None:
    q, k, v = tensors(**sizes)
    given = {"heads": sizes.get("heads", 4), "kv_heads": sizes.get("kv_heads", 4), "scale": 0.37, **options}
    key_mask = some_keys(2, k.shape[1]) if masked else None
    expected = by_loops(q, k, v, key_mask, **given)
    torch.testing.assert_close(attention(q, k, v, key_mask, **given).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 7, 9), (1, 4, 7, 9), (2, 1, 7, 9), (2, 1, 1, 9), (1, 1, 7, 1)])
def test_a_bias_broadcasts(shape: tuple[int, ...]) -> None:
    q, k, v = tensors(S=9)
    bias, sizes = torch.randn(shape), torch.rand(2, 9).add(1).log()
    given = {"heads": 4, "kv_heads": 4, "scale": 0.5}
    ours = attention(q, k, v, some_keys(2, 9), bias, sizes, **given)
    expected = by_loops(q, k, v, some_keys(2, 9), bias, sizes, **given)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_key_that_stands_for_two_is_two_keys() -> None:
    q, k, v = tensors(S=5)
    twice = [0, 1, 1, 2, 3, 4]
    sizes = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]).log().expand(2, 5)
    given = {"heads": 4, "kv_heads": 4, "scale": 0.5}
    torch.testing.assert_close(
        attention(q, k, v, None, None, sizes, **given), attention(q, k[:, twice], v[:, twice], **given)
    )


def test_a_query_without_keys_gets_zeros() -> None:
    q, k, v = tensors()
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    given = {"heads": 4, "kv_heads": 4, "scale": 0.5}
    assert torch.equal(attention(q, k, v, nothing, **given), torch.zeros(2, 7, 12))
    minus = torch.full((1, 1, 7, 7), float("-inf"))
    assert torch.equal(attention(q, k, v, None, minus, **given), torch.zeros(2, 7, 12))
    # left padding under a causal mask: the first rows see nothing, the others are not disturbed
    padded = torch.arange(7) >= 3
    out = attention(q, k, v, padded.expand(2, 7), **given, causal=True)
    assert torch.equal(out[:, :3], torch.zeros(2, 3, 12))
    torch.testing.assert_close(out[:, 3:], attention(q[:, 3:], k[:, 3:], v[:, 3:], **given, causal=True))


def test_large_logits_do_not_overflow() -> None:
    q, k, v = tensors()
    out = attention(q * 1e3, k * 1e3, v, heads=4, kv_heads=4, scale=1.0)
    assert bool(out.isfinite().all())


def test_a_masked_key_cannot_matter() -> None:
    q, k, v = tensors()
    mask = some_keys(2, 7)
    spoiled = k.masked_fill(~mask.unsqueeze(-1), 1e4), v.masked_fill(~mask.unsqueeze(-1), 1e4)
    given = {"heads": 4, "kv_heads": 4, "scale": 0.5}
    assert torch.equal(attention(q, k, v, mask, **given), attention(q, *spoiled, mask, **given))


def test_visible_keys_are_a_band() -> None:
    assert visible_keys(2, 4, True, 1, -1).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert bool(visible_keys(3, 5, False, -1, -1).all())


def test_cost_counts_both_products() -> None:
    from xformopt.kernels.attention.operator import OPERATOR

    q, k, v = tensors(B=2, T=5, S=9, heads=4, kv_heads=2, D=3, E=7)
    # scores: 2 B H T S D; weighted values: 2 B H T S E
    assert OPERATOR.flops(q, k, v, heads=4, kv_heads=2, scale=1.0) == 2 * 2 * 4 * 5 * 9 * (3 + 7)


def test_widths_that_do_not_fit_are_refused() -> None:
    from xformopt.program import Program

    text = """program "m" lifted
input %q: f32[2,5,12]
input %k: f32[2,5,8]
%y: f32[2,5,8] = xf.attention(%q, %k, %k) {heads=4, kv_heads=4, scale=1.0}
return y=%y
"""
    with pytest.raises(Exception, match="q and k disagree on the head width"):
        Program.parse(text)


def test_gradient_of_grouped_masked_attention() -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors(B=1, T=3, S=3, heads=2, kv_heads=1))
    mask = torch.tensor([[True, True, False]])
    assert torch.autograd.gradcheck(
        lambda *x: xf.attention(*x, mask, heads=2, kv_heads=1, scale=0.5, causal=True), (q, k, v)
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_halves_of_attention_are_operators(kv_heads: int) -> None:
    q, k, v = (torch.randn(2, n, w, dtype=torch.float64) for n, w in ((5, 32), (7, 8 * kv_heads), (7, 6 * kv_heads)))
    options = {"heads": 4, "kv_heads": kv_heads}
    weights = xf.attention_weights(q, k, scale=0.3, causal=True, **options)
    assert weights.shape == (2, 4, 5, 7)
    found = xf.attention_values(weights, v, **options)
    wanted = by_loops(q, k, v, scale=0.3, causal=True, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    operators = load_operators()
    assert operators["attention_weights"].flops(q, k, scale=0.3, **options) == 2 * 2 * 4 * 5 * 7 * 8
    assert operators["attention_values"].flops(weights, v, **options) == 2 * 2 * 4 * 5 * 7 * 6
    given = tuple(value.requires_grad_() for value in (q, k, v))
    torch.library.opcheck(xf.attention_weights, given[:2], {"scale": 0.3, **options})
    torch.library.opcheck(xf.attention_values, (weights.detach().requires_grad_(), given[2]), options)
