"""The target ort-cuda where there is no GPU: what it refuses, and which forms it would take."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest

from xformopt.errors import ArtifactError, MissingExtraError
from xformopt.lowering import lower, targets
from xformopt.lowering.artifact import Artifact
from xformopt.lowering.onnx_export import export_onnx
from xformopt.lowering.onnx_forms import build_graph, offered_forms
from xformopt.lowering.ort_session import OrtSession, read_profile
from xformopt.program import Program

CUDA = "CUDAExecutionProvider"
pytestmark = pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="there is a GPU's provider")

QUANTIZED = """
program "int8" target
dim rows in [1, 64]
input %x: f32[rows,24]
param %w: i8[8,24]
param %s: f32[8]
%y: f32[rows,8] = xf.quantized_linear(%x, %w, %s)  # up
return y=%y
"""


def test_without_its_provider_the_extra_is_named(encoder: Program) -> None:
    with pytest.raises(MissingExtraError, match=r'ort-cuda needs the package "onnxruntime-gpu".*xformopt\[ort-gpu\]'):
        lower(encoder, "ort-cuda")
    listed = {target.name: target for target in targets()}["ort-cuda"]
    assert not listed.available
    assert "pip uninstall onnxruntime" in listed.why_not


def test_forms_for_processors_are_not_taken() -> None:
    exported = export_onnx(Program.parse(QUANTIZED))
    assert build_graph(exported, {}).forms["quantized_linear"] == {"dynamic_matmul": 1}
    assert build_graph(exported, {}, on_gpu=True).forms["quantized_linear"] == {"dynamic_integers": 1}
    assert "dynamic_matmul" in offered_forms(exported)["quantized_linear"]
    assert "dynamic_matmul" not in offered_forms(exported, on_gpu=True).get("quantized_linear", ())


def test_a_provider_that_does_not_start_is_an_error(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    # ONNX Runtime lists a provider it was built with, and leaves it out where its libraries are missing
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    with pytest.warns(UserWarning, match=CUDA), pytest.raises(ArtifactError, match=rf"could not start its {CUDA}"):
        OrtSession(artifact.model_path, artifact.manifest.session, target="ort-cuda")


def test_what_runs_on_the_processor_is_listed(tmp_path: Path) -> None:
    def event(name: str, provider: str) -> dict[str, object]:
        return {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "dur": 1000,
            "args": {"op_name": "Shape", "provider": provider},
        }

    path = tmp_path / "profile.json"
    path.write_text(json.dumps([event("a", CUDA), event("b", "CPUExecutionProvider")]))
    assert read_profile(path, target="ort-cuda")[1] == ["b (Shape) ran on CPUExecutionProvider"]
    assert read_profile(path)[1] == [f"a (Shape) ran on {CUDA}"]
