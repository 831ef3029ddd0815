"""Attention by binary codes: pair by pair with Python's integers, as the float form was, in ONNX and in TVM."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.hamming_attention.tvm import Sizes, hamming_attention
from xformopt.kernels.pack_bits.tvm import packed
from xformopt.kernels.packing import packed_size
from xformopt.lowering import lower
from xformopt.program import Program

HEADS, E = 2, 24
CASES = pytest.mark.parametrize(
    ("bits", "causal", "masked"), [(16, False, False), (5, False, True), (11, True, True), (8, True, False)]
)


def drawn(bits: int, T: int, S: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Bits of queries and keys ``[2, T, heads, b]``, and values."""
    q, k = (torch.rand(2, size, HEADS, bits, generator=rng) > 0.5 for size in (T, S))
    return q, k, torch.randn(2, S, HEADS * E, generator=rng)


def mask_of(S: int) -> torch.Tensor:
    """Keys of which the first and one in the middle do not exist, and a sequence without any."""
    mask = torch.ones(2, S, dtype=torch.bool)
    mask[0, 0] = mask[0, S // 2] = False
    mask[1] = False
    return mask


def codes(bits: torch.Tensor) -> torch.Tensor:
    return xf.pack_bits(bits).flatten(2)


def pair_by_pair(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Hamming distances of integers, one pair at a time."""
    found = torch.zeros(2, q.shape[1], HEADS, E, dtype=torch.float64)

    def word(row: torch.Tensor) -> int:
        return sum(1 << place for place, bit in enumerate(row.tolist()) if bit)

    values, b = v.double().unflatten(-1, (HEADS, E)), q.shape[-1]
    for n in range(2):
        for h in range(HEADS):
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if (mask is None or mask[n, j]) and (j <= i or not causal)]
                weights = [2 * (b - (word(q[n, i, h]) ^ word(k[n, j, h])).bit_count()) for j in keys]
                for j, weight in zip(keys, weights, strict=True):
                    found[n, i, h] += weight / (sum(weights) + 1e-6) * values[n, j, h]
    return found.flatten(2)


@CASES
def test_weights_count_bits_that_agree(bits: int, causal: bool, masked: bool, rng: torch.Generator) -> None:
    q, k, v = drawn(bits, 7, 7 if causal else 9, rng)
    mask = mask_of(k.shape[1]) if masked else None
    found = xf.hamming_attention(codes(q), codes(k), v.double(), mask, heads=HEADS, bits=bits, causal=causal)
    torch.testing.assert_close(found, pair_by_pair(q, k, v, mask, causal), rtol=1e-9, atol=1e-9)


def test_it_is_linear_attention_of_signs(rng: torch.Generator) -> None:
    """As EcoFormer writes it: codes of -1 and 1, and a feature whose square is b."""
    q, k, v = drawn(12, 40, 40, rng)
    features = [functional.pad(x.float() * 2 - 1, (0, 1), value=math.sqrt(12)).flatten(2) for x in (q, k)]
    wanted = xf.linear_attention(*features, v, heads=HEADS, feature="given")
    found = xf.hamming_attention(codes(q), codes(k), v, heads=HEADS, bits=12)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_opposite_codes_weigh_nothing() -> None:
    q = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    k = torch.stack((~q[0], q[0])).transpose(0, 1)[:, :, 0].unsqueeze(2)
    v = torch.tensor([[[5.0], [3.0]]])
    found = xf.hamming_attention(codes(q), codes(k), v, heads=1, bits=9, eps=0.0)
    assert found.item() == 3.0


@pytest.mark.parametrize("count", [1, 8, 13])
def test_bits_begin_in_the_lowest_place(count: int, rng: torch.Generator) -> None:
    bits = torch.rand(2, 3, count, generator=rng) > 0.5
    found = xf.pack_bits(bits)
    wanted = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_torch_accepts_the_operators(rng: torch.Generator) -> None:
    q, k, v = drawn(10, 4, 6, rng)
    operators = load_operators()
    torch.library.opcheck(operators["pack_bits"].overload, (q,))
    given, options = (codes(q), codes(k), v.requires_grad_(), mask_of(6)), {"heads": HEADS, "bits": 10}
    torch.library.opcheck(operators["hamming_attention"].overload, given, options)
    assert operators["hamming_attention"].flops(*given, **options) == 2 * (4 + 6) * 10 * HEADS * (E + 1)
    assert operators["pack_bits"].flops(q) == 0


def test_values_have_gradients(rng: torch.Generator) -> None:
    q, k, v = drawn(6, 3, 4, rng)
    start = v.double()[..., : HEADS * 2].clone().requires_grad_()

    def call(values: torch.Tensor) -> torch.Tensor:
        return xf.hamming_attention(codes(q), codes(k), values, heads=HEADS, bits=6)

    assert torch.autograd.gradcheck(call, [start], fast_mode=True)


@pytest.mark.parametrize(
    ("shapes", "dtype", "options", "message"),
    [
        (((1, 3, 4), (1, 3, 4), (1, 3, 8)), torch.int8, {"bits": 16}, "must be packed bits"),
        (((1, 3, 4), (1, 3, 4), (1, 3, 8)), torch.uint8, {"bits": 17}, "must hold 17 bits for each head"),
        (((1, 3, 4), (1, 5, 4), (1, 5, 8)), torch.uint8, {"bits": 16, "causal": True}, "one key for each query"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, dtype: torch.dtype, options: Any, message: str) -> None:
    q, k, v = (torch.empty(shape, device="meta", dtype=dtype) for shape in shapes)
    with pytest.raises(RuntimeError, match=message):
        xf.hamming_attention(q, k, v.float(), heads=HEADS, **options)
    with pytest.raises(RuntimeError, match="bits must be bool"):
        xf.pack_bits(q)


@CASES
def test_onnx_form(bits: int, causal: bool, masked: bool, rng: torch.Generator) -> None:
    pytest.importorskip("onnxruntime")
    size = HEADS * packed_size(bits, 1)
    text = f"""
program "codes" lifted
dim batch in [1, inf]
dim length in [1, inf]
input %q: bool[batch,length,{HEADS},{bits}]
input %k: bool[batch,length,{HEADS},{bits}]
input %v: f32[batch,length,{HEADS * E}]
input %mask: bool[batch,length]
%pq: u8[batch,length,{HEADS},{size // HEADS}] = xf.pack_bits(%q)
%pk: u8[batch,length,{HEADS},{size // HEADS}] = xf.pack_bits(%k)
%fq: u8[batch,length,{size}] = aten.flatten.using_ints(%pq) {{start_dim=2}}
%fk: u8[batch,length,{size}] = aten.flatten.using_ints(%pk) {{start_dim=2}}
%o: f32[batch,length,{HEADS * E}] = xf.hamming_attention(%fq, %fk, %v{", %mask" if masked else ""}) \
{{heads={HEADS}, bits={bits}, causal={str(causal).lower()}}}
return o=%o
"""
    program = Program.parse(text if masked else text.replace("input %mask: bool[batch,length]\n", ""))
    artifact = lower(program, measure=False)
    for length in (1, 7, 70):
        q, k, v = drawn(bits, length, length, rng)
        given = {"q": q, "k": k, "v": v, **({"mask": mask_of(length)} if masked else {})}
        found = artifact.run(**{name: value.numpy() for name, value in given.items()})["o"]
        np.testing.assert_allclose(found, program.run(given)["o"], rtol=1e-5, atol=1e-5)


@CASES
def test_tvm_kernel_multiplies_nothing(bits: int, causal: bool, masked: bool, rng: torch.Generator) -> None:
    tvm = pytest.importorskip("tvm")
    q, k, v = drawn(bits, 7, 7 if causal else 9, rng)
    mask = mask_of(k.shape[1]) if masked else None

    def run(function: Any, output: np.ndarray, *operands: torch.Tensor) -> np.ndarray:
        target = tvm.target.Target({"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())})
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        compiled, result = tvm.compile(module, target=target), tvm.runtime.tensor(output)
        # multiplications of floats, as x86 and Arm call them
        assert not re.search(r"\t(vmul|vf[n]?m|mul[ps][sd]|fmul|fmadd|fmla)", compiled.mod.inspect_source("asm"))
        compiled["main"](*(tvm.runtime.tensor(each.numpy()) for each in operands), result)
        return np.asarray(result.numpy())

    stored = run(packed(tuple(q.shape)), np.full((*q.shape[:-1], packed_size(bits, 1)), 255, np.uint8), q)
    np.testing.assert_array_equal(stored, xf.pack_bits(q).numpy())
    expected = xf.hamming_attention(codes(q), codes(k), v, mask, heads=HEADS, bits=bits, causal=causal)
    sizes = Sizes(2, 7, k.shape[1], HEADS, bits, E, masked, causal, 1e-6)
    operands = (codes(q), codes(k), v, *([] if mask is None else [mask]))
    found = run(hamming_attention(sizes), np.full(expected.shape, np.nan, np.float32), *operands)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
