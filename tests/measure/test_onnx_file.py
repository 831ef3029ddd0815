"""The plain ONNX runner, and the profile of ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xformopt.errors import MeasurementError
from xformopt.measure.onnx_file import OnnxFileRunner, read_profile

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = np.array([[-1.0, 2.0]], dtype=np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "project"),
        helper.make_node("Relu", ["h"], ["y"], "clip"),
    ]
    shape = [None, 2]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    path = tmp_path / "model[1].onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_runs_and_ignores_inputs_it_does_not_name(model: Path) -> None:
    runner = OnnxFileRunner(model, threads=1)
    assert (runner.input_names, runner.output_names) == (("x",), ("y",))
    np.testing.assert_array_equal(runner.run({"x": X, "extra": X})["y"], [[5.0, 6.0]])
    assert runner.size_bytes == model.stat().st_size
    (model.parent / f"{model.name}.data").write_bytes(b"1234")
    assert runner.size_bytes == model.stat().st_size + 4


def test_profiles_by_node_without_the_warm_up(model: Path) -> None:
    runner = OnnxFileRunner(model, threads=1, settings={"optimization_level": "none"})
    nodes = {node.name: node for node in runner.profile({"x": X}, rounds=3)}
    assert {name: (node.op_type, node.count) for name, node in nodes.items()} == {
        "project": ("MatMul", 3),
        "clip": ("Relu", 3),
    }
    assert all(node.total_ms >= 0 for node in nodes.values())


def test_keeps_the_profile_where_asked(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "profiles"
    kept.mkdir()
    OnnxFileRunner(model, threads=1, profile_to=kept).profile({"x": X}, rounds=1)
    assert len(list(kept.iterdir())) == 1


def test_reads_only_kernel_times(tmp_path: Path) -> None:
    def node(name: str, at: int, duration: int) -> dict[str, object]:
        return {"cat": "Node", "name": name, "ts": at, "dur": duration, "args": {"op_name": "Add"}}

    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 50},
        node("a_kernel_time", 1, 1000),
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
        node("a_kernel_time", 101, 30),
        node("a_fence_before", 101, 99),
        node("b_kernel_time", 110, 40),
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    found = read_profile(path, skip_runs=1)
    assert [(node.name, node.total_ms, node.count) for node in found] == [("b", 0.04, 1), ("a", 0.03, 1)]


def test_session_settings_are_applied(model: Path) -> None:
    settings = {
        "optimization_level": "basic",
        "disabled_optimizers": ["MatMulAddFusion"],
        "inter_op_threads": 1,
        "config": {"session.intra_op.allow_spinning": "0"},
    }
    assert OnnxFileRunner(model, threads=1, settings=settings).run({"x": X})["y"].shape == (1, 2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"optimisation": 1}, "unknown session settings optimisation"), ({"optimization_level": "o9"}, '"o9"')],
)
def test_unknown_settings(model: Path, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(MeasurementError, match=reason):
        OnnxFileRunner(model, threads=1, settings=settings)


def test_bad_files_and_inputs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="no ONNX file"):
        OnnxFileRunner(tmp_path / "absent.onnx", threads=1)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(MeasurementError, match=r"cannot open broken\.onnx"):
        OnnxFileRunner(tmp_path / "broken.onnx", threads=1)
    with pytest.raises(MeasurementError, match="needs the inputs x"):
        OnnxFileRunner(model, threads=1).run({"z": X})
