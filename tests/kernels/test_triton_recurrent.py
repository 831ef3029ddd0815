"""The Triton kernels of recurrences, under Triton's interpreter, over several chunks of which the last is not full."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn, relative

from xformopt.kernels.triton_form import load_kernels

T = 70


def gates(*shape: int, strongest: float) -> torch.Tensor:
    """Log decays from none at all to ones that forget at once."""
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(7))
    return -strongest * drawn**4


@pytest.mark.parametrize("strongest", [0.1, 30.0])
def test_retention(strongest: float) -> None:
    q, k, v = randn(2, T, 2 * 20), randn(2, T, 40), randn(2, T, 2 * 24)
    assert_kernel("retention", q, k, v, gates(2, strongest=strongest), heads=2, scale=0.3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("has_skip", [False, True])
def test_ssd(groups: int, has_skip: bool) -> None:
    x, dt, a = randn(2, T, 4 * 20), randn(2, T, 4).abs(), -randn(4).abs() * 3
    b, c = randn(2, T, groups * 16), randn(2, T, groups * 17)[..., : groups * 16]
    assert_kernel("ssd", x, dt, a, b, c, randn(4) if has_skip else None, heads=4, groups=groups)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention(normalize: bool) -> None:
    q, k, v = randn(2, T, 2 * 20), randn(2, T, 40), randn(2, T, 2 * 24)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, 50:] = False
    assert_kernel("linear_attention", q, k, v, mask, heads=2, causal=True, normalize=normalize)


def test_linear_attention_on_projected_features() -> None:
    q, k, v, projection = randn(1, 70, 2 * 12), randn(1, 70, 24), randn(1, 70, 32), randn(2, 12, 9)
    assert_kernel("linear_attention", q, k, v, None, projection, heads=2, feature="hedgehog", causal=True)


@pytest.mark.parametrize(("strongest", "heads", "batch"), [(0.1, 2, 1), (30.0, 1, 2)])
def test_gated_linear_attention(strongest: float, heads: int, batch: int) -> None:
    q, k, v = randn(batch, T, heads * 33), randn(batch, T, heads * 33), randn(batch, T, heads * 17)
    gate = gates(batch, T, heads * 33, strongest=strongest)
    assert_kernel("gated_linear_attention", q, k, v, gate, heads=heads, scale=0.3)


def unit_keys(*shape: int, heads: int) -> torch.Tensor:
    keys = randn(*shape).unflatten(-1, (heads, -1))
    return (keys / keys.norm(dim=-1, keepdim=True)).flatten(-2)


@pytest.mark.parametrize(("largest", "D", "E"), [(1.0, 20, 24), (2.0, 70, 33)])
def test_delta_rule(largest: float, D: int, E: int) -> None:
    """With ``beta`` up to 2, transitions have negative eigenvalues."""
    q, k, v = randn(2, T, 2 * D), unit_keys(2, T, 2 * D, heads=2), randn(2, T, 2 * E)
    beta = largest * randn(2, T, 2).sigmoid()
    assert_kernel("delta_rule", q, k, v, beta, heads=2, scale=0.3)


def test_delta_rule_of_one_key_keeps_the_last_value() -> None:
    """All that is known without the kernel: the same key again and again, replaced wholly each time."""
    key = torch.zeros(1, T, 16)
    key[..., 3] = 1.0
    v = randn(1, T, 16)
    torch.testing.assert_close(computed("delta_rule", key, key, v, torch.ones(1, T, 1), heads=1), v)


def test_delta_rule_goes_on_from_a_state() -> None:
    q, k, v, beta = randn(1, 50, 40), unit_keys(1, 50, 40, heads=2), randn(1, 50, 48), 2 * randn(1, 50, 2).sigmoid()
    whole = computed("delta_rule", q, k, v, beta, heads=2)
    state, parts = torch.zeros(1, 2, 20, 24), []
    for part in (slice(0, 33), slice(33, 50)):
        out, state = assert_kernel("delta_rule_resumed", *(x[:, part] for x in (q, k, v, beta)), state, heads=2)
        parts.append(out)
    assert relative(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.slow
def test_many_chunks() -> None:
    q, k, v = (randn(1, 300, 24) for _ in range(3))
    assert_kernel("gated_linear_attention", q, k, v, gates(1, 300, 24, strongest=0.3), heads=1)
    assert_kernel("retention", q, k, v, gates(1, strongest=0.2), heads=1)


def test_states_of_several_parts() -> None:
    """Keys and values wider than what one program holds of a state."""
    q, k, v = (randn(1, 66, width) for width in (100, 100, 70))
    assert_kernel("gated_linear_attention", q, k, v, gates(1, 66, 100, strongest=1.0), heads=1)
    assert_kernel("linear_attention", q, k, v, heads=1, feature="given", causal=True, normalize=False)
    assert_kernel("linear_attention", q, k, v, heads=1, causal=True)


def test_half_precision() -> None:
    q, k, v = (randn(1, 40, 32, dtype=torch.bfloat16) for _ in range(3))
    decay = gates(1, 40, 32, strongest=1.0).bfloat16()
    assert_kernel("gated_linear_attention", q, k, v, decay, heads=2)
    assert_kernel("retention", q, k, v, gates(2, strongest=0.2), heads=2)
    keys, beta = unit_keys(1, 40, 32, heads=2).bfloat16(), 2 * randn(1, 40, 2).sigmoid().bfloat16()
    assert_kernel("delta_rule", q, keys, v, beta, heads=2)


def test_gates_that_forget_everything() -> None:
    q, k, v = (randn(1, 40, 16) for _ in range(3))
    gate = torch.full((1, 40, 16), -1e4)
    # nothing but each token itself is left
    ours = computed("gated_linear_attention", q, k, v, gate, heads=1)
    torch.testing.assert_close(ours, (q * k).sum(-1, keepdim=True) * v, rtol=1e-5, atol=1e-5)


def test_what_is_refused_is_said() -> None:
    kernels = load_kernels()
    x = randn(1, 3, 300)
    assert "300 wide" in str(kernels["retention"].accepts(x, x, x, randn(1), heads=1))
    assert "not causal" in str(kernels["linear_attention"].accepts(x, x, x, heads=2))
    assert "not causal" in str(kernels["ssd"].accepts(x, x, x, x, x, heads=2, causal=False))
    assert "torch.float16" in str(kernels["gated_linear_attention"].accepts(x.half(), x, x, x, heads=2))
