"""What matters to class scores (APHQ-ViT's perturbation Hessian): by numpy, and of sequences of several lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xformopt.lowering import lower
from xformopt.passes import build_pass
from xformopt.passes.quantize.support.perturbation import perturbation_hessian
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.reconstruction import cut_blocks


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_importance_is_the_change_of_the_gradient() -> None:
    program = Program.parse("""
program "m" lifted
dim batch in [1, inf]
input %x: f32[batch,2,3]
param %w: f32[3,3]
param %head: f32[5,3]
%l: f32[batch,2,3] = xf.linear(%x, %w)
%y: f32[batch,2,3] = aten.add.Tensor(%x, %l)
%z: f32[batch,2,5] = xf.linear(%y, %head)
return logits=%z
""")
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    (found,) = perturbation_hessian(program, [{"x": x}], cut_blocks(program), "z").values()
    head = program.parameters["head"].double().numpy()
    y = (x.double() + x.double() @ program.parameters["w"].double().t()).numpy()

    def log_softmax(scores: np.ndarray) -> np.ndarray:
        return np.asarray(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))

    def gradient(moved: np.ndarray) -> np.ndarray:
        log, wanted = log_softmax(moved @ head.T / 20), log_softmax(y @ head.T / 20)
        divergence = (np.exp(log) * (log - wanted)).sum(-1, keepdims=True)
        return np.asarray(np.exp(log) * (log - wanted - divergence) @ head / 20)

    wanted = np.abs(gradient(y + 1e-6) - gradient(y - 1e-6)).mean(0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


LENGTHS = """
program "m" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %x: f32[batch,length,16]
input %mask: i64[batch,length]
param %g: f32[16]
param %w: f32[16,16]
param %up: f32[32,16]
param %down: f32[16,32]
param %head: f32[5,16]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%n: f32[batch,length,16] = xf.layer_norm(%x, %g) {eps=1e-05}
%a: f32[batch,length,16] = xf.attention(%n, %n, %n, %keep) {heads=2, kv_heads=2, scale=0.35}
%o: f32[batch,length,16] = xf.linear(%a, %w)
%r: f32[batch,length,16] = aten.add.Tensor(%o, %x)
%u: f32[batch,length,32] = xf.linear(%r, %up)
%e: f32[batch,length,32] = xf.activation(%u) {function="gelu"}
%d: f32[batch,length,16] = xf.linear(%e, %down)
%s: f32[batch,length,16] = aten.add.Tensor(%d, %r)
%z: f32[batch,length,5] = xf.linear(%s, %head)
return logits=%z valid keep %mask
"""


def of_lengths(*lengths: int) -> list[dict[str, torch.Tensor]]:
    """Two sequences of each length, of the second of which a third is padding."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in lengths:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - length // 3 :] = 0
        found.append({"x": torch.randn(2, length, 16, generator=generator), "mask": mask})
    return found


def test_importance_of_several_lengths_is_that_of_channels() -> None:
    program = Program.parse(LENGTHS)
    batches = of_lengths(5, 12)
    blocks = cut_blocks(program)
    both = perturbation_hessian(program, batches, blocks, "z")
    assert {tuple(value.shape) for value in both.values()} == {(16,)}
    # of one length it is that of positions; each sample's mean over its own tokens counts the same
    samples = [{name: value[row : row + 1] for name, value in batch.items()} for batch in batches for row in (0, 1)]
    apart = [perturbation_hessian(program, [sample], blocks, "z") for sample in samples]
    for name, value in both.items():
        means = [found[name][sample["mask"][0] != 0].mean(0) for found, sample in zip(apart, samples, strict=True)]
        torch.testing.assert_close(value, torch.stack(means).mean(0), rtol=1e-3, atol=1e-12)


def test_calibration_data_of_several_lengths_trains_quantizers() -> None:
    program = Program.parse(LENGTHS)
    batches = of_lengths(5, 12, 7)
    chosen = build_pass("aphq", {"iterations": 4, "bits": 8, "activation_bits": 8, "attention": False})
    result = chosen.run(program, Context(calibration=batches))
    artifact = lower(result.program, measure=False)
    for batch in batches:
        valid = batch["mask"] != 0
        found = artifact.run(**{name: value.numpy() for name, value in batch.items()})["logits"]
        wanted = program.run(batch)["logits"][valid]
        assert float((torch.from_numpy(found)[valid] - wanted).norm() / wanted.norm()) < 0.3
    assert artifact.manifest.execution == {"linear layers executed in int8": 4}
