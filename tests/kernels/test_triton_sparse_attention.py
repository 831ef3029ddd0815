"""The Triton kernel of block-sparse attention, under Triton's interpreter: blocks that are not allowed are not read."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn

from xformopt.kernels.triton_form import load_kernels

# a block of queries that sees nothing, one that sees all, one that sees the last block only
ALLOWED = torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 1, 1]], [[0, 0, 1], [1, 1, 0], [0, 1, 1]]]).bool()
OPTIONS = {"heads": 2, "scale": 0.3, "block": 16}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_block_sparse_attention(causal: bool, masked: bool) -> None:
    q, k, v = randn(2, 41, 2 * 20), randn(2, 39, 2 * 20), randn(2, 39, 2 * 24)
    key_mask = torch.arange(39) < torch.tensor([[39], [20]]) if masked else None
    bias = randn(1, 2, 41, 39) if masked else None
    ours = assert_kernel("block_sparse_attention", q, k, v, ALLOWED, key_mask, bias, causal=causal, **OPTIONS)
    assert not ours[:, 16:32, :24].any()


def test_one_mask_for_all_heads_and_blocks_of_several_steps() -> None:
    q, k, v = randn(1, 150, 32), randn(1, 200, 32), randn(1, 200, 32)
    options = {**OPTIONS, "block": 128}
    allowed = torch.tensor([[[1, 0], [1, 1]]]).bool()
    assert_kernel("block_sparse_attention", q, k, v, allowed, causal=True, **options)


def test_what_is_not_allowed_is_not_read() -> None:
    q, k, v = (randn(1, 41, 32) for _ in range(3))
    allowed = torch.tensor([[[1, 0, 1]] * 3]).bool()
    expected = computed("block_sparse_attention", q, k, v, allowed, **OPTIONS)
    k[:, 16:32], v[:, 16:32] = float("nan"), float("nan")
    assert torch.equal(computed("block_sparse_attention", q, k, v, allowed, **OPTIONS), expected)


def test_what_is_refused_is_said() -> None:
    accepts, q = load_kernels()["block_sparse_attention"].accepts, randn(1, 41, 32)
    assert "24 tokens" in str(accepts(q, q, q, ALLOWED, heads=2, scale=1.0, block=24))
    assert "torch.float64" in str(accepts(*(x.double() for x in (q, q, q)), ALLOWED, **OPTIONS))
