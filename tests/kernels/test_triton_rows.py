"""The Triton kernels of norms, rotary embedding, activations, gates and merging, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_kernel, computed, randn

from xformopt.kernels.activation.reference import FUNCTIONS
from xformopt.kernels.triton_form import load_kernels

HALVES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = randn(3, 5, 37, dtype=dtype), randn(37, dtype=dtype), randn(36 + 1, dtype=dtype)
    affine = (weight, bias) if name == "layer_norm" else (weight,)
    assert_kernel(name, x, *affine, eps=1e-5)
    assert_kernel(name, x, eps=1e-5)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_over_heads_and_of_parts(name: str) -> None:
    assert_kernel(name, randn(2, 5, 36), randn(9), eps=1e-5, groups=4)
    part = randn(2, 5, 3 * 33)[..., 33:66]
    assert_kernel(name, part, randn(33), eps=1e-5)


def test_a_norm_far_from_zero() -> None:
    """The mean is subtracted before anything is squared."""
    assert_kernel("layer_norm", randn(3, 300) + 1000.0, eps=1e-5, tolerance=1e-4)


def test_rows_wider_than_a_program_of_short_ones() -> None:
    assert_kernel("layer_norm", randn(2, 3001), randn(3001), eps=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_norms_with_their_residual(name: str, dtype: torch.dtype) -> None:
    x, residual, weight = randn(3, 5, 37, dtype=dtype), randn(3, 37, 5, dtype=dtype).mT, randn(37, dtype=dtype)
    _, total = assert_kernel(name, x, residual, weight, eps=1e-5)
    # the interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(total, x + residual, rtol=0.01 if dtype == torch.bfloat16 else 0.0, atol=0.0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotated", "batches"), [(24, 1), (24, 3), (10, 3)])
def test_rope(interleaved: bool, rotated: int, batches: int) -> None:
    angles = randn(batches, 37, rotated // 2)
    x = randn(3, 37, 4 * 24)
    assert_kernel("rope", x, angles.cos(), angles.sin(), heads=4, interleaved=interleaved)


def test_rope_of_a_part_in_half_precision() -> None:
    angles, x = randn(1, 21, 8, dtype=torch.bfloat16), randn(2, 21, 96, dtype=torch.bfloat16)[..., 32:64]
    assert_kernel("rope", x, angles.cos(), angles.sin(), heads=2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_and_gates(function: str) -> None:
    both = randn(5, 7, 2 * 33, scale=3.0)
    assert_kernel("activation", both, function=function)
    assert_kernel("glu", *both.chunk(2, -1), function=function)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_in_half_precision(dtype: torch.dtype) -> None:
    assert_kernel("glu", randn(3, 1100, dtype=dtype), randn(3, 1100, dtype=dtype), function="silu")


def test_an_activation_keeps_what_is_not_finite() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.5])
    assert str(computed("activation", x, function="relu").tolist()) == "[nan, inf, 0.0, 0.0]"
    assert computed("activation", x, function="gelu_tanh")[0].isnan()


@pytest.mark.parametrize("has_sizes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(has_sizes: bool, dtype: torch.dtype) -> None:
    order = torch.stack([torch.randperm(37, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    kept, sources = order[:, :20], order[:, 20:]
    # several join the first, none the last
    destinations = torch.tensor(
        [[0] * 5 + [3] * 6 + [7, 1, 2, 0, 18, 5], [4, 4, 9, 1, 0, 2, 2, 2, 3, 8, 8, 8, 8, 8, 6, 5, 1]]
    )
    sizes = torch.randint(1, 9, (2, 37), generator=torch.Generator().manual_seed(5)).to(dtype) if has_sizes else None
    assert_kernel("merge_tokens", randn(2, 37, 33, dtype=dtype), kept, sources, destinations, sizes)


def test_merging_padding_with_padding_gives_zeros() -> None:
    sizes = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    indices = (torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.tensor([[0, 1]]))
    merged, totals = assert_kernel("merge_tokens", randn(1, 4, 5), *indices, sizes)
    assert totals.tolist() == [[0.0, 3.0]]
    assert not merged[0, 0].any()


def test_merging_nothing() -> None:
    none = torch.empty(1, 0, dtype=torch.int64)
    assert_kernel("merge_tokens", randn(1, 4, 5), torch.tensor([[0, 1, 2, 3]]), none, none)


def test_a_pack_without_tokens() -> None:
    nothing = torch.empty(1, 0, 8)
    for name, operands, options in (
        ("activation", (nothing,), {"function": "gelu"}),
        ("glu", (nothing, nothing), {"function": "silu"}),
        ("layer_norm", (nothing, randn(8)), {"eps": 1e-5}),
        ("linear_activation", (nothing, randn(8, 8)), {"function": "relu"}),
    ):
        assert computed(name, *operands, **options).shape == (1, 0, 8)


def test_what_is_refused_is_said() -> None:
    kernels = load_kernels()
    x = randn(2, 3, 8)
    assert "17000 wide" in str(kernels["layer_norm"].accepts(randn(1, 17000), eps=1e-5))
    assert "torch.float16" in str(kernels["layer_norm"].accepts(x, randn(8).half(), eps=1e-5))
    assert "not (2, 3, 8)" in str(kernels["add_rms_norm"].accepts(x, randn(1, 3, 8), eps=1e-5))
    assert "another dtype" in str(kernels["rope"].accepts(x.half(), randn(1, 3, 2), randn(1, 3, 2), heads=2))
    assert "(2, 3, 8)" in str(kernels["glu"].accepts(x, randn(8), function="relu"))
    assert "torch.float64" in str(kernels["activation"].accepts(x.double(), function="relu"))
    index = torch.zeros(2, 1, dtype=torch.int64)
    assert "9000 wide" in str(kernels["merge_tokens"].accepts(randn(2, 3, 9000), index, index, index))
