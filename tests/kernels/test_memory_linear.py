"""Hashed tables: by Python's own loops, in ONNX and in TVM, fitted to a layer, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import xformopt as xo
from xformopt.errors import DataError, PassError
from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.memory_linear.tvm import memory_linear
from xformopt.lowering import lower
from xformopt.passes import build_pass, parse_pass
from xformopt.pipeline import Context
from xformopt.program import Program

OPERATOR = "memory_linear"


def by_loops(x: torch.Tensor, tables: torch.Tensor, bias: torch.Tensor | None, t: float) -> torch.Tensor:
    """The softmax over all vectors of signs, term by term."""
    K, entries, outputs = tables.shape
    b = int(math.log2(entries))
    found = []
    for row in x.reshape(-1, K * b).tolist():
        total = [0.0] * outputs if bias is None else bias.tolist()
        for k in range(K):
            z = row[k * b : (k + 1) * b]
            exponents = [sum((1 if s >> i & 1 else -1) * z[i] for i in range(b)) / t for s in range(entries)]
            place = max(range(entries), key=lambda s: exponents[s])
            sureness = 1 / sum(math.exp(e - exponents[place]) for e in exponents)
            total = [y + sureness * entry for y, entry in zip(total, tables[k, place].tolist(), strict=True)]
        found.append(total)
    return torch.tensor(found, dtype=torch.float64).view(*x.shape[:-1], outputs)


def drawn(rng: torch.Generator, outputs: int = 21) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((2, 5, 12), (4, 8, outputs), (outputs,))
    x, tables, bias = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return x, tables, bias


@pytest.mark.parametrize("has_bias", [True, False])
def test_definition(has_bias: bool, rng: torch.Generator) -> None:
    x, tables, bias = drawn(rng)
    given = bias if has_bias else None
    found = xf.memory_linear(x, tables, given, temperature=0.7)
    torch.testing.assert_close(found, by_loops(x, tables, given, 0.7), rtol=1e-9, atol=1e-9)


def test_zero_counts_as_positive() -> None:
    tables = torch.arange(4.0).reshape(1, 4, 1)
    assert xf.memory_linear(torch.zeros(1, 2), tables, temperature=1.0).item() == 3 / 4


def test_torch_accepts_the_operator(rng: torch.Generator) -> None:
    given = tuple(value.requires_grad_() for value in drawn(rng))
    operator = load_operators()[OPERATOR]
    torch.library.opcheck(operator.overload, given, {"temperature": 0.7})
    assert operator.flops(*given, temperature=0.7) == 10 * (2 * 4 * 21 + 8 * 12)
    assert torch.autograd.gradcheck(lambda *a: operator.overload(*a, temperature=0.7), given, fast_mode=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 13), (4, 8, 5), (5,)), "do not divide the width"),
        (((1, 12), (4, 4, 5), (5,)), "one row for each vector of signs"),
        (((1, 12), (4, 8, 5), (6,)), "one number per output channel"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        xf.memory_linear(*(torch.empty(shape, device="meta") for shape in shapes), temperature=1.0)


@pytest.mark.parametrize(("has_bias", "outputs"), [(True, 21), (False, 7)])
def test_tvm_kernel(has_bias: bool, outputs: int, rng: torch.Generator) -> None:
    tvm = pytest.importorskip("tvm")
    x, tables, bias = (value.float() for value in drawn(rng, outputs))
    x[0, 0, :2] = torch.tensor([0.0, -0.0])
    given = (x, tables, *([bias] if has_bias else []))
    function = memory_linear(tuple(x.shape), tuple(tables.shape), 0.7, 4, has_bias=has_bias)
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())})
    compiled = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    output = tvm.runtime.tensor(np.full((2, 5, outputs), np.nan, np.float32))
    compiled["main"](*(tvm.runtime.tensor(value.numpy()) for value in given), output)
    expected = xf.memory_linear(*given, temperature=0.7)
    np.testing.assert_allclose(output.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


TEXT = """
program "m" lifted
dim batch in [1, inf]
input %x: f32[batch,6,8]
param %a.weight: f32[12,8]
param %a.bias: f32[12]
param %b.weight: f32[5,12]
%h: f32[batch,6,12] = xf.linear_activation(%x, %a.weight, %a.bias) {function=relu}
%y: f32[batch,6,5] = xf.linear(%h, %b.weight)
return y=%y
"""


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(60, 6, 8, generator=generator)} for _ in range(2)]


def test_tables_answer_as_least_squares_do() -> None:
    """One layer's tables are the least squares of their features, by numpy."""
    program = Program.parse(TEXT)
    result = build_pass("tabulate-linears", {"bits": 2, "layers": ["a.*"], "ridge": 1e-9}).run(
        program, Context(calibration=batches())
    )
    assert len(result.fired) == 1
    (node,) = [node for node in result.program.nodes() if node.target is xf.memory_linear]
    tables, bias = (result.program.parameters[name].double() for name in ("a.tables", "a.tables.bias"))
    x = torch.cat([batch["x"] for batch in batches()]).flatten(0, 1).double()
    signs, t = x.unflatten(1, (4, 2)) >= 0, node.kwargs["temperature"]
    sureness = 1 / (1 + (-2 * x.unflatten(1, (4, 2)).abs() / t).exp()).prod(-1)
    features = np.zeros((len(x), 17))
    features[:, 16] = 1
    for k in range(4):
        place = signs[:, k, 0].int() + 2 * signs[:, k, 1].int()
        features[np.arange(len(x)), 4 * k + place.numpy()] = sureness[:, k].numpy()
    wanted = x.float() @ program.parameters["a.weight"].T + program.parameters["a.bias"]
    best, *_ = np.linalg.lstsq(features, wanted.double().numpy(), rcond=None)
    stacked = np.concatenate((tables.flatten(0, 1).numpy(), bias[None].numpy()))
    np.testing.assert_allclose(features @ stacked, features @ best, atol=1e-3)


def test_later_layers_make_up_for_earlier_ones_and_the_artifact_runs() -> None:
    program = Program.parse(TEXT)
    result = xo.Pipeline([parse_pass("tabulate-linears{bits=2}")]).run(program, calibration=batches())
    targets = [str(node.target) for node in result.program.nodes()]
    assert targets.count("xf.memory_linear.default") == 2
    batch = {"x": batches()[0]["x"][:3]}
    wanted, ours = program.run(batch)["y"], result.program.run(batch)["y"]
    error = float((ours - wanted).norm() / wanted.norm())
    # signs of two thirds of the variance, twice
    assert 0.1 < error < 0.95
    for target in ("ort-cpu", "tvm-cpu"):
        pytest.importorskip({"ort-cpu": "onnxruntime", "tvm-cpu": "tvm"}[target])
        artifact = lower(result.program, target, sizes={"batch": 3}, measure=False)
        np.testing.assert_allclose(artifact.run(x=batch["x"].numpy())["y"], ours.numpy(), rtol=1e-4, atol=1e-5)
        assert artifact.manifest.execution == {"linear layers as hashed tables, summed in float": 2}


def test_recovery_trains_the_tables() -> None:
    steps = [parse_pass("tabulate-linears{bits=2}"), parse_pass("recover-accuracy{iterations=30,learning_rate=0.01}")]
    result = xo.Pipeline(steps).run(Program.parse(TEXT), calibration=batches())
    before, after = (step.drift for step in result.history[-2:])
    assert after < before


def test_layers_that_err_stay() -> None:
    program = Program.parse(TEXT)
    chosen = build_pass("tabulate-linears", {"bits": 2, "max_error": 1e-6})
    result = chosen.run(program, Context(calibration=batches()))
    assert not result.changed
    assert {"more than max_error" in refusal.reason for refusal in result.rejected} == {True}


def test_data_is_needed() -> None:
    with pytest.raises(DataError, match="fitted on calibration data"):
        build_pass("tabulate-linears", {}).run(Program.parse(TEXT), Context())
    empty = Program.parse('program "e" lifted\ninput %x: f32[2]\n%y: f32[2] = aten.neg(%x)\nreturn y=%y')
    with pytest.raises(PassError, match="no linear layers"):
        build_pass("tabulate-linears", {}).run(empty, Context(calibration=batches()))
