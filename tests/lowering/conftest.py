"""A small encoder, lowered once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from xformopt.lowering import lower
from xformopt.lowering.artifact import Artifact
from xformopt.program import Program

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ENCODER = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %ids: i64[batch,length] below 50
input %mask: i64[batch,length]
param %table: f32[50,24]
param %q.w: f32[24,24]
param %q.b: f32[24]
param %o.w: f32[24,24]
param %o.b: f32[24]
param %norm.w: f32[24]
param %norm.b: f32[24]
param %up.w: f32[48,24]
param %up.b: f32[48]
param %down.w: f32[24,48]
param %down.b: f32[24]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%x: f32[batch,length,24] = aten.embedding(%table, %ids)  # embeddings
%q: f32[batch,length,24] = xf.linear(%x, %q.w, %q.b)  # layer.0.attention.query
%a: f32[batch,length,24] = xf.attention(%q, %x, %x, %keep) {heads=4, kv_heads=4, scale=0.4}  # layer.0.attention
%o: f32[batch,length,24] = xf.linear(%a, %o.w, %o.b)  # layer.0.attention.output
%s: f32[batch,length,24] = aten.add.Tensor(%o, %x)  # layer.0
%n: f32[batch,length,24] = xf.layer_norm(%s, %norm.w, %norm.b) {eps=1e-05}  # layer.0.norm
%u: f32[batch,length,48] = xf.linear_activation(%n, %up.w, %up.b) {function=gelu}  # layer.0.up
%d: f32[batch,length,24] = xf.linear(%u, %down.w, %down.b)  # layer.0.down
%pooled: f32[batch,24] = xf.mean_pool(%d, %mask) {eps=1e-09}  # pool
return hidden=%d valid keep %mask, pooled=%pooled
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def encoder() -> Program:
    return Program.parse(ENCODER)


@pytest.fixture(scope="session")
def artifact(encoder: Program) -> Artifact:
    return lower(encoder, measure=False, captured=encoder, history=[{"name": "nothing"}], source="tests")


@pytest.fixture(scope="session")
def saved_once(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "encoder"
    artifact.save(folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved_once, tmp_path / "encoder"))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"ids": torch.randint(0, 50, (3, 7), generator=generator), "mask": mask}
