"""The Triton kernel of the selective scan, under Triton's interpreter, over chunks of which the last is not full."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn

from xformopt.kernels.triton_form import load_kernels


@pytest.mark.parametrize(("states", "channels", "batch"), [(16, 11, 1), (5, 7, 2)])
def test_selective_scan(states: int, channels: int, batch: int) -> None:
    x, dt, a = randn(batch, 37, channels), randn(batch, 37, channels).abs(), -randn(channels, states).abs() * 3
    b, c = randn(batch, 37, states), randn(batch, 37, 2 * states)[..., states:]
    assert_kernel("selective_scan", x, dt, a, b, c, randn(channels) if batch == 1 else None)


def test_in_half_precision_with_rates_in_single() -> None:
    x, dt = randn(1, 20, 9, dtype=torch.bfloat16), randn(1, 20, 9).abs().bfloat16()
    b, c = randn(1, 20, 8, dtype=torch.bfloat16), randn(1, 20, 8, dtype=torch.bfloat16)
    assert_kernel("selective_scan", x, dt, -randn(9, 8).abs(), b, c, randn(9))


def test_states_that_are_forgotten_at_once() -> None:
    x, dt, b, c = randn(1, 33, 4), torch.full((1, 33, 4), 1e4), randn(1, 33, 3), randn(1, 33, 3)
    ours = computed("selective_scan", x, dt, -torch.ones(4, 3), b, c)
    # nothing but each token itself is left
    torch.testing.assert_close(ours, dt * x * (b * c).sum(-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_what_is_refused_is_said() -> None:
    kernel = load_kernels()["selective_scan"]
    x, b = randn(1, 3, 4), randn(1, 3, 65)
    assert "65 states" in str(kernel.accepts(x, x, randn(4, 65), b, b))
    assert "torch.float64" in str(kernel.accepts(x.double(), x, randn(4, 5), randn(1, 3, 5), randn(1, 3, 5)))
