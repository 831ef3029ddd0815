"""Quantizers against definitions written in numpy, bit for bit; packing against its inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xformopt.errors import DataError
from xformopt.kernels.definition import xf
from xformopt.kernels.packing import pack, unpack
from xformopt.observers import BINS, Method, Range, affine_parameters, narrow, observe_ranges, rows_of
from xformopt.passes.gram_matrices import gram_matrices
from xformopt.passes.quantize.support.gptq import gptq
from xformopt.passes.quantize.support.quantization import dequantized, quantize_groups, quantize_rows
from xformopt.program import Program


def weights(rows: int = 7, columns: int = 96) -> torch.Tensor:
    """A matrix with a row of zeros, a group of zeros, a group of one sign, and an outlier."""
    found = torch.randn(rows, columns)
    found[2] = 0
    found[3, 32:64] = 0
    found[4, :32] = found[4, :32].abs() + 0.5
    found[5, 7] = 40
    return found


@pytest.mark.parametrize("limit", [63, 127])
def test_rows_are_rounded_as_defined(limit: int) -> None:
    weight = weights()
    codes, scale = quantize_rows(weight, reduce_range=limit == 63)
    w = weight.numpy()
    steps = np.abs(w).max(1) / np.float32(limit)
    steps[steps == 0] = 1
    assert np.array_equal(scale.numpy(), steps)
    assert np.array_equal(codes.numpy(), np.clip(np.rint(w / steps[:, None]), -limit, limit).astype(np.int8))
    assert not codes[2].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 96])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_are_rounded_as_defined(bits: int, group: int, symmetric: bool) -> None:
    weight = weights()
    found = quantize_groups(weight, bits=bits, group=group, symmetric=symmetric)
    w, last = weight.numpy().reshape(7, -1, group), np.float32(2**bits - 1)
    if symmetric:
        scale = np.abs(w).max(2) / np.float32(2 ** (bits - 1) - 1)
    else:
        scale = (np.maximum(w.max(2), 0) - np.minimum(w.min(2), 0)) / last
    scale[scale == 0] = 1
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.rint(-np.minimum(w.min(2), 0) / scale)
    codes = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, last)
    assert np.array_equal(found.scale.numpy(), scale)
    assert found.zero is None if symmetric else np.array_equal(found.zero.numpy(), zero)  # type: ignore[union-attr]
    assert np.array_equal(found.codes.numpy(), codes.reshape(7, -1))
    values = ((codes - zero[..., None]) * scale[..., None]).reshape(7, -1)
    assert np.array_equal(dequantized(found).numpy(), values)
    # half a step, and one more where the range was widened and its zero rounded
    assert (np.abs(values.reshape(w.shape) - w) <= scale[..., None] * 1.01).all()


def optimal_brain(w: np.ndarray, hessian: np.ndarray, group: int, last: int) -> np.ndarray:
    """Round column after column, moving those that are left by the inverse Hessian of their own."""
    w = w.copy()
    codes = np.zeros(w.shape)
    for j in range(w.shape[1]):
        if j % group == 0:
            block = w[:, j : j + group].astype(np.float32)
            low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
            step = ((high - low) / np.float32(last)).astype(float)
            zero = np.rint(-low / step.astype(np.float32))
        codes[:, j] = np.clip(np.rint(w[:, j] / step) + zero, 0, last)
        inverse = np.linalg.inv(hessian[j:, j:])
        error = (w[:, j] - (codes[:, j] - zero) * step) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return codes


def test_gptq_moves_what_is_left_by_the_inverse_hessian() -> None:
    weight = torch.randn(9, 48)
    x = torch.randn(200, 48).double() @ torch.randn(48, 48).double()
    x[:, 5] = 0
    gram = x.t() @ x
    found = gptq(weight, gram, bits=4, group=16, symmetric=False)
    hessian = 2 * gram.numpy()
    w = weight.double().numpy().copy()
    w[:, 5] = 0
    damped = hessian + np.eye(48) * 0.01 * hessian.diagonal().mean()
    damped[5, 5] += 1
    assert np.array_equal(found.codes.numpy(), optimal_brain(w, damped, 16, 15))
    nearest = quantize_groups(weight, bits=4, group=16, symmetric=False)
    losses = [float(((dequantized(f) - weight).double() @ x.t()).norm()) for f in (found, nearest)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_unpacking_is_the_inverse_of_packing(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_of_two_codes_the_first_has_the_low_bits() -> None:
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


def test_codes_of_six_bits_run_on_from_byte_to_byte() -> None:
    packed = pack(torch.tensor([[1, 2, 3, 63, 33]], dtype=torch.uint8), 6)
    assert int.from_bytes(bytes(packed[0].tolist()), "little") == 1 | 2 << 6 | 3 << 12 | 63 << 18 | 33 << 24


PROGRAM = Program.parse("""
program "m" lifted
dim batch in [1, inf]
dim length in [1, inf]
input %x: f32[batch,length,6]
input %mask: i64[batch,length]
%h: f32[batch,length,6] = xf.activation(%x) {function=gelu}
return y=%h valid keep %mask
""")


def batches(count: int = 3, length: int = 50) -> list[dict[str, torch.Tensor]]:
    found = []
    for _ in range(count):
        mask = torch.ones(4, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        x = torch.randn(4, length, 6)
        # padding, which must not count
        x[1, length // 2 :] = 1000
        found.append({"x": x, "mask": mask})
    return found


def kept(given: list[dict[str, torch.Tensor]]) -> np.ndarray:
    return np.concatenate([torch.nn.functional.gelu(b["x"])[b["mask"].bool()].numpy() for b in given]).astype(float)


def test_smallest_and_largest_values_are_seen() -> None:
    given = batches()
    values = kept(given)
    found = observe_ranges(PROGRAM, given, ["h"])["h"]
    assert (found.low.tolist(), found.high.tolist()) == ([values.min()], [values.max()])
    channels = observe_ranges(PROGRAM, given, ["h"], granularity="channel")["h"]
    assert channels.low.tolist() == values.min(0).tolist()
    groups = observe_ranges(PROGRAM, given, ["h"], granularity="group", group=3)["h"]
    assert groups.high.tolist() == values.reshape(-1, 2, 3).max((0, 2)).tolist()
    tokens = observe_ranges(PROGRAM, given, ["h"], granularity="token")["h"]
    assert tokens.high.shape == (4 * 50,)


def counts_of(values: np.ndarray) -> np.ndarray:
    bins = np.floor((values - values.min()) / (values.max() - values.min()) * BINS)
    return np.bincount(np.clip(bins, 0, BINS - 1).astype(int).ravel(), minlength=BINS)


def candidates(values: np.ndarray) -> list[tuple[float, float]]:
    return [(values.min() * k / 100, values.max() * k / 100) for k in range(100, 10, -1)]


def codes_of(low: float, high: float, centers: np.ndarray) -> tuple[np.ndarray, np.float64, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float64(np.float32((high - low) / 255))
    zero = float(np.rint(-low / scale))
    return np.clip(np.rint(centers / scale) + zero, 0, 255), scale, zero


def squared_error(low: float, high: float, centers: np.ndarray, counts: np.ndarray) -> float:
    codes, scale, zero = codes_of(low, high, centers)
    return float((((centers - (codes - zero) * scale) ** 2) * counts).sum())


def divergence(low: float, high: float, centers: np.ndarray, counts: np.ndarray) -> float:
    codes, scale, zero = codes_of(low, high, centers)
    inside = np.flatnonzero(np.rint(centers / scale) + zero == codes)
    p = np.zeros(BINS)
    p[inside] = counts[inside]
    q = np.zeros(BINS)
    for code in np.unique(codes):
        full = [i for i in inside if codes[i] == code and counts[i]]
        if full:
            q[full] = counts[full].sum() / len(full)
    p[inside[0]] += counts[: inside[0]].sum()
    p[inside[-1]] += counts[inside[-1] + 1 :].sum()
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-4 / BINS))).sum())


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_the_range_of_least_loss_is_chosen(method: Method) -> None:
    given = batches(length=2000)
    given[0]["x"][0, 0, 0] = 12.0
    values = kept(given)
    loss = {"mse": squared_error, "entropy": divergence}[method]
    edges = np.linspace(values.min(), values.max(), BINS + 1)
    losses = [loss(*ends, (edges[1:] + edges[:-1]) / 2, counts_of(values)) for ends in candidates(values)]
    found = observe_ranges(PROGRAM, given, ["h"], method=method)["h"]
    assert (float(found.low), float(found.high)) == pytest.approx(candidates(values)[int(np.argmin(losses))], rel=1e-12)
    assert float(found.high) < 12


def test_a_percentile_leaves_out_either_end() -> None:
    given = batches(6)
    values = kept(given)
    found = observe_ranges(PROGRAM, given, ["h"], method="percentile", percentile=98)["h"]
    width = (values.max() - values.min()) / BINS
    low, high = np.percentile(values, [1, 99])
    assert abs(float(found.low) - low) <= 2 * width
    assert abs(float(found.high) - high) <= 2 * width


def test_gram_matrices_leave_out_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batches()
    values = kept(given)
    (found,) = gram_matrices(PROGRAM, given, ["h"])
    np.testing.assert_allclose(found["h"].gram.numpy(), values.T @ values, rtol=1e-10)
    np.testing.assert_allclose(found["h"].magnitude.numpy() / found["h"].count, np.abs(values).mean(0), rtol=1e-10)
    monkeypatch.setattr("xformopt.passes.gram_matrices._GRAM_BYTES", 1)
    assert [list(part) for part in gram_matrices(PROGRAM, given, ["h", "x"])] == [["x"], ["h"]]


def test_rows_choose_for_themselves() -> None:
    ends = Range(torch.tensor([-1.0, 0.0]).double(), torch.tensor([1.0, 4.0]).double())
    counts = torch.ones(2, BINS, dtype=torch.int64)
    counts[0, BINS // 2] = 10**6
    both = narrow(ends, counts, method="percentile", percentile=90)
    assert both.high[0] < 0.01
    assert float(both.high[1]) == pytest.approx(3.8, abs=0.01)


def test_scale_and_zero_hold_zero() -> None:
    scale, zero = affine_parameters(
        Range(torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([5.1, -1.0, 0]).double())
    )
    assert scale.tolist() == [pytest.approx(5.1 / 255), pytest.approx(2 / 255), 1.0]
    assert zero.tolist() == [0, 255, 0]


def test_what_has_no_range_is_refused() -> None:
    with pytest.raises(DataError, match="there is none"):
        observe_ranges(PROGRAM, [], ["h"])
    given = batches(1)
    given[0]["x"][0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="1 values that are NaN or infinite"):
        observe_ranges(PROGRAM, given, ["h"])
    with pytest.raises(DataError, match="do not divide the 6 channels"):
        rows_of(torch.zeros(2, 6), "group", 4)
    uneven = [*batches(1), *batches(1, length=9)]
    with pytest.raises(DataError, match="inputs of one size"):
        observe_ranges(PROGRAM, uneven, ["h"], granularity="token")


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_one_group_a_row_may_end_within_a_byte(bits: int) -> None:
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    found = quantize_groups(weight, bits=bits, group=7, symmetric=False)
    packed = found.packed()
    assert packed.weight.shape == (5, 1, -(-7 * bits // 8))
    product = xf.weight_only_linear(x, packed.weight, packed.scale, packed.zero, bits=bits)
    torch.testing.assert_close(product, x @ dequantized(found).t())
