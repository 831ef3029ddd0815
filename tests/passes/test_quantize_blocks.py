"""Blocks of integers with powers of two: codes by numpy, the ratio reached, and an encoder on the target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from xformopt.errors import DataError, PassError, UsageError
from xformopt.kernels.definition import xf
from xformopt.kernels.packing import unpack
from xformopt.lowering import lower
from xformopt.passes import parse_pass
from xformopt.passes.quantize.quantize_blocks import block_codes
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.program.text import target_name

ENCODER = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %ids: i64[batch,length] below 80
input %mask: i64[batch,length]
param %table: f32[80,64]
param %q.w: f32[64,64]
param %q.b: f32[64]
param %norm.w: f32[64]
param %norm.b: f32[64]
param %up.w: f32[100,64]
param %down.w: f32[64,100]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%x: f32[batch,length,64] = aten.embedding(%table, %ids)
%n: f32[batch,length,64] = xf.layer_norm(%x, %norm.w, %norm.b) {eps=1e-05}
%q: f32[batch,length,64] = xf.linear(%n, %q.w, %q.b)
%a: f32[batch,length,64] = xf.attention(%q, %n, %n, %keep) {heads=4, kv_heads=4, scale=0.25}
%s: f32[batch,length,64] = aten.add.Tensor(%a, %x)
%u: f32[batch,length,100] = xf.linear(%s, %up.w)
%g: f32[batch,length,100] = xf.activation(%u) {function=gelu}
%d: f32[batch,length,64] = xf.linear(%g, %down.w)
return y=%d valid keep %mask
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return [{"ids": torch.randint(0, 80, (3, 9)), "mask": mask}]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_exponents_lose_least(bits: int) -> None:
    value = torch.randn(7, 13) * torch.exp2(torch.randn(7, 13) * 4)
    value[0, :10] = 0
    packed, exponents = block_codes(value, bits=bits, block=10)
    middle, w = 2 ** (bits - 1), value.double().numpy().ravel()
    codes = unpack(packed, bits, 91).numpy().astype(int) - middle
    for index, exponent in enumerate(exponents.tolist()):
        part, found = w[10 * index : 10 * index + 10], codes[10 * index : 10 * index + 10]
        assert np.array_equal(found, np.clip(np.rint(part / 2.0**exponent), -middle, middle - 1))
        top = np.ceil(np.log2((np.abs(part).max() or 1) / (middle - 1)))
        losses = {
            e: float(((np.clip(np.rint(part / 2.0**e), -middle, middle - 1) * 2.0**e - part) ** 2).sum())
            for e in (top, top - 1, top - 2)
        }
        assert losses[exponent] <= min(losses.values()) * (1 + 1e-12)
    found = xf.block_parameter(packed, exponents, bits=bits, block=10, shape=[7, 13])
    scales = np.repeat(2.0 ** exponents.numpy().astype(float), 10)[:91]
    assert np.array_equal(found.numpy(), (codes * scales).reshape(7, 13).astype(np.float32))


def test_everything_is_quantized_and_runs(batches: list[dict[str, torch.Tensor]]) -> None:
    encoder = Program.parse(ENCODER)
    result = parse_pass("quantize-blocks").run(encoder, Context(calibration=batches))
    names = [target_name(node.target) for node in result.program.nodes()]
    # seven parameters; five results and softmax, where what is returned stays
    assert names.count("xf.block_parameter") == 7
    assert names.count("xf.fake_quantize") == 7
    wanted = result.program.run(batches[0])["y"]
    assert 0 < distance(encoder.run(batches[0])["y"], wanted) < 0.5
    eight = parse_pass("quantize-blocks{bits=8,block=64}").run(encoder, Context(calibration=batches)).program
    keep = batches[0]["mask"].bool()
    assert distance(encoder.run(batches[0])["y"][keep], eight.run(batches[0])["y"][keep]) < 0.05
    artifact = lower(result.program, measure=False)
    found = artifact.run(**{name: value.numpy() for name, value in batches[0].items()})["y"]
    assert distance(wanted[keep], torch.from_numpy(found)[keep]) < 1e-2
    execution = artifact.manifest.execution
    assert execution["parameters stored in 4 bits, computed in float"] == 4
    assert execution["activations in 8 bits, simulated in float"] == 7


def test_the_ratio_is_that_of_the_bytes(batches: list[dict[str, torch.Tensor]]) -> None:
    encoder = Program.parse(ENCODER)
    result = parse_pass("quantize-blocks{results=false}").run(encoder, Context())
    # 4 bits for matrices, 8 for vectors, a byte for each block of 1280
    sizes = {name: value.numel() for name, value in encoder.parameters.items()}
    bits = {name: 4 if encoder.parameters[name].dim() > 1 else 8 for name in sizes}
    after = sum(-(-sizes[n] * bits[n] // 8) + -(-sizes[n] // 1280) for n in sizes)
    assert f"became {after}, a ratio of {encoder.parameter_bytes / after:.3f} (published: 7.988)" in result.notes[0]
    # equal parameters are stored once
    assert sum(value.nbytes for value in result.program.parameters.values()) <= after
    wide = Program.parse(
        'program "m" lifted\ninput %x: f32[2,768]\nparam %w: f32[3072,768]\n'
        "%y: f32[2,3072] = xf.linear(%x, %w)\nreturn y=%y\n"
    )
    note = parse_pass("quantize-blocks{results=false}").run(wide, Context()).notes[0]
    assert float(note.split("ratio of ")[1].split(" ")[0]) > 7.98


def test_what_is_refused(batches: list[dict[str, torch.Tensor]]) -> None:
    encoder = Program.parse(ENCODER)
    with pytest.raises(DataError, match="there is none"):
        parse_pass("quantize-blocks").run(encoder, Context())
    once = parse_pass("quantize-blocks").run(encoder, Context(calibration=batches)).program
    with pytest.raises(PassError, match="already quantized"):
        parse_pass("quantize-blocks").run(once, Context(calibration=batches))
    broken = Program.parse(ENCODER, parameters=dict(encoder.parameters) | {"q.b": torch.full((64,), torch.inf)})
    with pytest.raises(PassError, match=r"q\.b holds NaN or infinite"):
        parse_pass("quantize-blocks").run(broken, Context(calibration=batches))
    for text, message in (("bits=3", "must be 4 or 8"), ("block=0", "at least 1")):
        with pytest.raises(UsageError, match=message):
            parse_pass(f"quantize-blocks{{{text}}}")


CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: block(5, 2, bits=3), "4 or 8 bits"),
    (lambda: block(5, 2, bits=4), "as many codes as shape has"),
    (lambda: block(6, 2, bits=4), "one number per block"),
]


def block(codes: int, blocks: int, *, bits: int) -> torch.Tensor:
    held = (torch.empty(codes, dtype=torch.uint8, device="meta"), torch.empty(blocks, dtype=torch.int8, device="meta"))
    return xf.block_parameter(*held, bits=bits, block=4, shape=[3, 4])


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_codes_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
