"""TVM kernels against the definitions, into outputs that were NaN, at sizes nothing divides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.activation.reference import FUNCTIONS
from xformopt.kernels.activation.tvm import activate
from xformopt.kernels.add_layer_norm.reference import add_layer_norm as reference_add_layer_norm
from xformopt.kernels.attention.reference import attention as reference_attention
from xformopt.kernels.attention.tvm import Sizes, attention
from xformopt.kernels.layer_norm.reference import layer_norm as reference_layer_norm
from xformopt.kernels.layer_norm.tvm import layer_norm
from xformopt.kernels.linear.tvm import matmul, pack
from xformopt.kernels.linear_attention.reference import linear_attention as reference_linear_attention
from xformopt.kernels.linear_attention.tvm import Sizes as LinearSizes
from xformopt.kernels.linear_attention.tvm import linear_attention
from xformopt.kernels.match_tokens.reference import match_tokens
from xformopt.kernels.match_tokens.tvm import match
from xformopt.kernels.merge_tokens.reference import merge_tokens
from xformopt.kernels.merge_tokens.tvm import merge
from xformopt.kernels.packing import pack as pack_codes
from xformopt.kernels.patch_embedding.tvm import patches
from xformopt.kernels.quantized_linear.reference import dynamic_range as reference_range
from xformopt.kernels.quantized_linear.reference import quantize_activation, quantized_linear
from xformopt.kernels.quantized_linear.tvm import codes, dynamic_span
from xformopt.kernels.quantized_linear.tvm import matmul as matmul8
from xformopt.kernels.quantized_linear.tvm import pack as pack8
from xformopt.kernels.shift_linear.reference import shift_linear
from xformopt.kernels.shift_linear.tvm import matmul as shift_matmul
from xformopt.kernels.shift_linear.tvm import words
from xformopt.kernels.tvm_form import Machine, Tile
from xformopt.kernels.tvm_integers import dot_of
from xformopt.kernels.tvm_math import FUNCTIONS as TVM_FUNCTIONS
from xformopt.measure.machine import describe_machine

tvm = pytest.importorskip("tvm")


def compiled(function: Any) -> Any:
    """Compile a function for this machine."""
    target = {"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())}
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm.target.Target(target))["main"]


def run(function: Any, shape: tuple[int, ...], *operands: torch.Tensor | np.ndarray) -> np.ndarray:
    """Compile a function for this machine and return what it writes over NaN."""
    (output,) = run_many(function, (shape,), *operands)
    return output


def run_many(
    function: Any, shapes: tuple[tuple[int, ...], ...], *operands: torch.Tensor | np.ndarray
) -> list[np.ndarray]:
    """Do the same for a function of several results."""
    given = [tvm.runtime.tensor(np.ascontiguousarray(operand)) for operand in operands]
    outputs = [tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for shape in shapes]
    compiled(function)(*given, *outputs)
    return [np.asarray(output.numpy()) for output in outputs]


@pytest.mark.parametrize("function", [None, *FUNCTIONS])
def test_matmul(function: str | None, rng: torch.Generator) -> None:
    rows, inner, columns = 9, 13, 21
    x, w, bias = (torch.randn(shape, generator=rng) * 2 for shape in ((rows, inner), (columns, inner), (columns,)))
    tile = Tile(4, 8)
    kernel = matmul((rows, inner), (rows, columns), tile, has_bias=True, function=function)
    found = run(kernel, (rows, columns), x.numpy(), pack(w.numpy(), tile.columns), bias.numpy())
    expected = torch.nn.functional.linear(x, w, bias)
    expected = FUNCTIONS[function](expected) if function else expected
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=2e-5)


def test_matmul_without_bias_in_tiles_that_fit(rng: torch.Generator) -> None:
    x, w = torch.randn(8, 5, generator=rng), torch.randn(16, 5, generator=rng)
    found = run(
        matmul((8, 5), (8, 16), Tile(4, 8), has_bias=False, function=None), (8, 16), x.numpy(), pack(w.numpy(), 8)
    )
    np.testing.assert_allclose(found, (x @ w.T).numpy(), rtol=1e-5, atol=1e-5)


def test_every_activation_has_a_kernel() -> None:
    assert set(TVM_FUNCTIONS) == set(FUNCTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_left": 2, "window_right": 1},
        {"kv_heads": 2},
        {"has_mask": True},
        {"has_mask": True, "causal": True, "kv_heads": 1},
        {"has_mask": True, "has_log_size": True},
        {"bias": (1, 4, 7, 9)},
        {"bias": (2, 1, 1, 9), "has_log_size": True},
    ],
    ids=str,
)
def test_attention(options: dict[str, Any], rng: torch.Generator) -> None:
    settings = {"kv_heads": 4, "has_mask": False, "causal": False, "window_left": -1, "window_right": -1, **options}
    sizes = Sizes(B=2, T=7, S=9, heads=4, D=5, E=3, scale=0.45, **settings)
    q = torch.randn(2, 7, 20, generator=rng)
    k = torch.randn(2, 9, sizes.kv_heads * 5, generator=rng)
    v = torch.randn(2, 9, sizes.kv_heads * 3, generator=rng)
    mask = torch.rand(2, 9, generator=rng) > 0.3
    # a sequence without any key
    mask[1] = False
    sizes_of_keys = torch.randint(0, 3, (2, 9), generator=rng).float().log()
    given = {"bias": torch.randn(sizes.bias, generator=rng)} if sizes.bias else {}
    given |= {"key_log_size": sizes_of_keys} if sizes.has_log_size else {}
    hiding = {name: settings[name] for name in ("causal", "window_left", "window_right", "kv_heads")}
    expected = reference_attention(q, k, v, mask if sizes.has_mask else None, heads=4, scale=0.45, **hiding, **given)
    operands = [q.numpy(), k.numpy(), v.numpy(), *([mask.numpy()] if sizes.has_mask else []), *given.values()]
    found = run(attention(sizes, Tile(4, 8)), (2, 7, 12), *operands)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    if sizes.has_mask:
        assert not found[1].any()


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_affine", [False, True])
def test_layer_norm(has_residual: bool, has_affine: bool, rng: torch.Generator) -> None:
    shape, groups, width = (2, 3, 14), 1 if has_residual else 2, 14 if has_residual else 7
    x, residual = (torch.randn(shape, generator=rng) * 3 + 1 for _ in range(2))
    weight, bias = (torch.randn(width, generator=rng) for _ in range(2))
    kernel = layer_norm(shape, groups, 1e-5, has_residual=has_residual, has_weight=has_affine, has_bias=has_affine)
    affine = (weight, bias) if has_affine else ()
    if has_residual:
        outputs = run_many(kernel, (shape, shape), x, residual, *affine)
        expected = reference_add_layer_norm(x, residual, *affine, eps=1e-5)
    else:
        outputs = run_many(kernel, (shape,), x, *affine)
        expected = (reference_layer_norm(x, *affine, eps=1e-5, groups=groups),)
    for found, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=2e-6)


def test_patches(rng: torch.Generator) -> None:
    image = torch.randn(2, 3, 6, 10, generator=rng)
    found = run(patches(image.shape, (3, 5)), (2, 4, 45), image)
    expected = torch.nn.functional.unfold(image, (3, 5), stride=(3, 5)).transpose(1, 2)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(("function", "shape"), [("relu", (3, 5)), ("gelu", (1, 7, 701)), ("silu", (2, 16))])
def test_activation(function: str, shape: tuple[int, ...], rng: torch.Generator) -> None:
    x = torch.randn(shape, generator=rng) * 3
    np.testing.assert_allclose(run(activate(shape, function), shape, x), FUNCTIONS[function](x), rtol=2e-6, atol=2e-6)


def dots_here() -> list[str]:
    """Return the ways of adding integer products that this machine can run."""
    needed = {"vnni": "avx512_vnni", "madd": "avx2", "sdot": "asimddp"}
    return ["plain", *(name for name, flag in needed.items() if flag in describe_machine().isa)]


@pytest.mark.parametrize("dot_name", dots_here())
@pytest.mark.parametrize(
    ("shape", "columns", "height", "vectors"), [((2, 5, 38), 53, 3, 2), ((7, 4), 10, 4, 1), ((1, 3), 64, 1, 4)]
)
def test_quantized_linear(
    dot_name: str, shape: tuple[int, ...], columns: int, height: int, vectors: int, rng: torch.Generator
) -> None:
    lanes = {"vnni": 16, "madd": 8, "sdot": 4, "plain": 8}[dot_name]
    dot = dot_of(Machine(lanes, 32, dot_name))
    x = torch.randn(shape, generator=rng) * 4
    # the ends of both ranges are there: what would saturate does
    weight = torch.randint(-128, 128, (columns, shape[-1]), generator=rng).to(torch.int8)
    scale, bias = torch.rand(columns, generator=rng) / 100, torch.randn(columns, generator=rng)
    expected_span = reference_range(x)
    span = run(dynamic_span(shape), (2,), x)
    np.testing.assert_allclose(span, [float(value) for value in expected_span], rtol=1e-6)

    rows, tile = x[..., 0].numel(), Tile(height, vectors * lanes)
    padded = -(-shape[-1] // dot.group) * dot.group
    taken = tvm.runtime.tensor(np.full((rows, padded), 77, dot.codes))
    compiled(codes(shape, dot))(tvm.runtime.tensor(x.numpy()), tvm.runtime.tensor(span), taken)
    expected_codes = quantize_activation(x, *expected_span).reshape(rows, -1).numpy()
    np.testing.assert_array_equal(taken.numpy()[:, : shape[-1]].astype(int) + dot.shift, expected_codes)

    kernel = matmul8((rows, padded), (*shape[:-1], columns), tile, dot, lanes, has_bias=True)
    sums = weight.numpy().sum(1, dtype=np.int32)
    panels = pack8(weight.numpy(), tile.columns, dot)
    found = run(kernel, (*shape[:-1], columns), taken.numpy(), panels, sums, span, scale, bias)
    np.testing.assert_allclose(found, quantized_linear(x, weight, scale, bias), rtol=1e-5, atol=1e-4)


def test_zeros_have_a_range() -> None:
    np.testing.assert_array_equal(run(dynamic_span((3, 7)), (2,), torch.zeros(3, 7)), [1, 0])


@pytest.mark.parametrize("size", [1, 255, 257, 4097])
def test_the_range_sees_every_number(size: int) -> None:
    for place in {0, size // 2, size - 1}:
        x = torch.zeros(1, size)
        x[0, place] = 255 if place % 2 else -255
        np.testing.assert_array_equal(run(dynamic_span((1, size)), (2,), x), [1, 0 if place % 2 else 255])


@pytest.mark.parametrize(("bits", "has_bias"), [(5, True), (6, False)])
def test_shift_linear(bits: int, has_bias: bool, rng: torch.Generator) -> None:
    rows, inner, columns, top = 9, 13, 21, -1
    x = torch.randn(rows, inner, generator=rng) * 3
    # what is nothing, however it is written, and what is next to nothing
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-42, -1e-30])
    codes = torch.randint(0, 2**bits, (columns, inner), generator=rng).to(torch.uint8)
    # the weight 0 has two codes
    codes[:, 0], codes[:, 1] = 0, 2 ** (bits - 1)
    weight, bias = pack_codes(codes, bits), torch.randn(columns, generator=rng)
    tile = Tile(4, 8)
    kernel = shift_matmul((rows, inner), (rows, columns), tile, has_bias=has_bias)
    panels = pack(words(weight, bits, top, inner), tile.columns)
    found = run(kernel, (rows, columns), x, panels, *([bias] if has_bias else []))
    expected = shift_linear(x, weight, bias if has_bias else None, bits=bits, top=top)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("has_sizes", "tokens", "prefix", "r"), [(False, 12, 1, 3), (True, 9, 0, 4), (True, 11, 2, 1), (False, 10, 2, 0)]
)
def test_matching_and_merging_tokens(has_sizes: bool, tokens: int, prefix: int, r: int, rng: torch.Generator) -> None:
    keys, x = torch.randn(2, tokens, 12, generator=rng), torch.randn(2, tokens, 21, generator=rng)
    # tokens that are alike: their order is that of their places
    keys[0, prefix + 2] = keys[0, prefix]
    sizes = torch.randint(0, 3, (2, tokens), generator=rng).float()
    given = (sizes,) if has_sizes else ()
    expected = match_tokens(keys, *given, heads=3, prefix=prefix, r=r)
    indices = [tvm.runtime.tensor(np.full(value.shape, -1, np.int64)) for value in expected]
    operands = [tvm.runtime.tensor(value.numpy()) for value in (keys, *given)]
    compiled(match(keys.shape, 3, prefix, r, has_sizes))(*operands, *indices)
    for found, value in zip(indices, expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), value.numpy())

    merged, total = merge_tokens(x, *expected, *given)
    shapes = (tuple(merged.shape), tuple(total.shape))
    found_merged, found_total = run_many(merge(x.shape, r, has_sizes), shapes, x, *expected, *given)
    np.testing.assert_allclose(found_merged, merged.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found_total, total.numpy())


@pytest.mark.parametrize(
    ("feature", "causal", "has_mask", "normalize"),
    [("elu", False, False, True), ("given", False, True, True), ("elu", True, True, False)],
)
def test_linear_attention(feature: str, causal: bool, has_mask: bool, normalize: bool, rng: torch.Generator) -> None:
    B, T, S, heads, D, E = 2, 7, 7 if causal else 9, 3, 5, 24
    q, k = (torch.rand(B, size, heads * D, generator=rng) * 4 - (2 if feature == "elu" else 0) for size in (T, S))
    v = torch.randn(B, S, heads * E, generator=rng)
    mask = torch.rand(B, S, generator=rng) > 0.3
    sizes = LinearSizes(B, T, S, heads, D, E, feature, has_mask, causal, normalize, 1e-6)
    options = {"heads": heads, "feature": feature, "causal": causal, "normalize": normalize}
    expected = reference_linear_attention(q, k, v, mask if has_mask else None, **options)
    found = run(linear_attention(sizes), (B, T, heads * E), q, k, v, *([mask] if has_mask else []))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
