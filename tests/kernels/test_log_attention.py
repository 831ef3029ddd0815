"""Attention with logarithmic weights: by its codes, in TVM and in ONNX, and what AdaLog makes of a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.attention.tvm import Sizes
from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.log_attention.tvm import Levels, log_attention
from xformopt.kernels.log_quantize.reference import log_levels
from xformopt.kernels.log_quantize.tvm import quantize
from xformopt.kernels.tvm_form import Tile
from xformopt.kernels.tvm_math import log2
from xformopt.lowering import lower
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.program import Program

B, T, S, H, KV, D, E = 2, 7, 19, 4, 2, 5, 6
ADALOG = {"bits": 4, "numerator": 52, "denominator": 37, "round_table": True}
ROOT = {"bits": 3, "numerator": 1, "denominator": 2, "flush": False}


def drawn(rng: torch.Generator) -> dict[str, Any]:
    """Operands whose weights differ much, with keys that do not exist, and a sequence without any."""
    mask = torch.rand(B, S, generator=rng) > 0.3
    mask[1] = False
    return {
        "q": torch.randn(B, T, H * D, generator=rng) * 3,
        "k": torch.randn(B, S, KV * D, generator=rng),
        "v": torch.randn(B, S, KV * E, generator=rng),
        "level_scale": torch.tensor(1.0),
        "key_mask": mask,
        "bias": torch.randn(1, H, 1, S, generator=rng),
    }


def test_values_are_added_up_by_code(rng: torch.Generator) -> None:
    given = drawn(rng)
    options = {"heads": H, "kv_heads": KV, "scale": 0.4}
    found = xf.log_attention(*given.values(), **options, **ADALOG)
    weights = xf.attention_weights(given["q"], given["k"], given["key_mask"], given["bias"], **options).double()
    codes = (-37 / 52 * weights.log2()).round().clamp(max=16)
    values = given["v"].double().unflatten(-1, (KV, E)).transpose(1, 2).repeat_interleave(H // KV, 1)
    wanted = torch.zeros(B, H, T, E, dtype=torch.float64)
    for code in range(16):
        entry = round(2 ** (-(code * 52 % 37) / 37) * 30) / 30
        wanted += 2.0 ** -(code * 52 // 37) * entry * ((codes == code).double() @ values)
    torch.testing.assert_close(found.double(), wanted.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def test_torch_accepts_the_operator(rng: torch.Generator) -> None:
    given = drawn(rng)
    operator, options = load_operators()["log_attention"], {"heads": H, "kv_heads": KV, "scale": 0.4, **ADALOG}
    torch.library.opcheck(operator.overload, tuple(given.values()), options)
    assert operator.flops(*given.values(), **options) == B * H * T * S * (2 * D + 16 + E)
    with pytest.raises(RuntimeError, match="2 to 8 bits"):
        xf.log_attention(*(value.to("meta") for value in given.values()), **{**options, "bits": 9})


def run(function: Any, shape: tuple[int, ...], *operands: torch.Tensor) -> np.ndarray:
    """Compile a function for this machine and return what it writes over NaN."""
    tvm = pytest.importorskip("tvm")
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())})
    compiled = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    output = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    compiled["main"](*(tvm.runtime.tensor(operand.numpy()) for operand in operands), output)
    return np.asarray(output.numpy())


@pytest.mark.parametrize(
    ("levels", "scale", "masked"), [(ADALOG, 1.0, True), (ROOT, 0.3, False), ({**ROOT, "flush": True}, 0.5, True)]
)
def test_tvm_kernel(levels: dict[str, Any], scale: float, masked: bool, rng: torch.Generator) -> None:
    given = {**drawn(rng), "level_scale": torch.tensor(scale)}
    given["key_mask"] = given["key_mask"] if masked else None
    options = {"heads": H, "kv_heads": KV, "scale": 0.4}
    expected = xf.log_attention(*given.values(), **options, **levels)
    sizes = Sizes(B, T, S, H, KV, D, E, 0.4, masked, False, -1, -1, bias=(1, H, 1, S))
    whole = Levels(**{"round_table": False, "flush": True, **levels})
    operands = [given[name] for name, _, _ in sizes.operands]
    found = run(log_attention(sizes, whole, Tile(3, 8)), (B, T, H * E), *operands, given["level_scale"])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("levels", "scale"), [(ADALOG, 1.0), (ROOT, 0.375)])
def test_tvm_kernel_of_the_rounding_alone(levels: dict[str, Any], scale: float, rng: torch.Generator) -> None:
    x = torch.rand(3, 37, generator=rng) ** 6
    x[0, :5] = torch.tensor([0.0, 1.0, 2.0, -0.5, float("nan")])
    expected = xf.log_quantize(x, torch.tensor(scale), **levels)
    bits, numerator, denominator = (levels[name] for name in ("bits", "numerator", "denominator"))
    rounds, flush = levels.get("round_table", False), levels.get("flush", True)
    table = log_levels(bits, numerator, denominator, round_table=rounds, flush=flush).float()
    found = run(quantize((3, 37), bits, numerator, denominator), (3, 37), x, torch.tensor(scale), table)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_logarithm(rng: torch.Generator) -> None:
    pytest.importorskip("tvm")
    from tvm.script.ir_builder import tirx as ir

    from xformopt.kernels.tvm_loops import write_function

    x = torch.cat((torch.rand(59, generator=rng), torch.tensor([1.0, math.sqrt(2), 0.5, 1e-30, 1e30])))

    def body(given: Any, result: Any) -> None:
        given, result = ir.buffer_proxy(given), ir.buffer_proxy(result)
        with ir.vectorized(0, 64) as j:
            result[j] = log2(given[j])

    found = run(write_function([("x", (64,), "float32"), ("y", (64,), "float32")], body), (64,), x)
    np.testing.assert_allclose(found, x.double().log2().numpy(), rtol=2e-7, atol=2e-7)


TEXT = f"""
program "m" lifted
dim batch in [1, inf]
input %x: f32[batch,{S},16]
param %wq: f32[16,16]
param %wk: f32[16,16]
%q: f32[batch,{S},16] = xf.linear(%x, %wq)
%k: f32[batch,{S},16] = xf.linear(%x, %wk)
%a: f32[batch,{S},16] = xf.attention(%q, %k, %x) {{heads=2, kv_heads=2, scale=0.4}}
%g: f32[batch,{S},16] = xf.activation(%a) {{function=gelu}}
%y: f32[batch,{S},16] = xf.linear(%g, %wq)
return y=%y
"""


def test_what_adalog_makes_of_attention_runs() -> None:
    program = Program.parse(TEXT)
    batch = {"x": torch.randn(2, S, 16, generator=torch.Generator().manual_seed(1)) * 2}
    passes = [
        parse_pass("adalog{activation_bits=4,weight_bits=8,samples=64,rounds=1}"),
        parse_pass("fuse-log-attention"),
    ]
    result = Pipeline(passes).run(program, calibration=[batch])
    assert result.history[-1].fired == 1
    wanted = result.program.run(batch)["y"].numpy()
    for target in ("ort-cpu", "tvm-cpu"):
        pytest.importorskip({"ort-cpu": "onnxruntime", "tvm-cpu": "tvm"}[target])
        artifact = lower(result.program, target, sizes={"batch": 2}, measure=False)
        found = artifact.run(x=batch["x"].numpy())["y"]
        # a code on the edge may fall to either side
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-2, target
    assert artifact.manifest.forms["log_attention"] == {"kernel": 1}
    assert artifact.manifest.forms["log_quantize"] == {"kernel": 1}
