"""The targets there are, and which of them this machine can use."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

__all__ = ["ARTIFACT_TARGETS", "BASELINES", "GPU_TARGETS", "TUNING_SECONDS", "Target", "targets"]

BASELINES = ("eager", "inductor")
ARTIFACT_TARGETS = (
    *("ort-cpu", "ort-cuda", "openvino-cpu", "triton-cuda"),
    *("tvm-cpu", "tvm-x86-64-v3", "tvm-aarch64"),
)
# what computes in 16 bits; elsewhere they are what weights are stored in
GPU_TARGETS = ("ort-cuda", "triton-cuda")
# how long forms and tiles are timed unless told otherwise
TUNING_SECONDS = 40.0
_TVM = (("tvm",), "tvm")
_NEEDS = {
    "ort-cpu": (("onnxruntime", "onnx", "onnxscript"), "ort"),
    "ort-cuda": (("onnxruntime", "onnx", "onnxscript"), "ort-gpu"),
    "triton-cuda": (("triton",), "triton"),
    "openvino-cpu": (("openvino", "onnx"), "openvino"),
    "tvm-cpu": _TVM,
    "tvm-x86-64-v3": _TVM,
    "tvm-aarch64": _TVM,
}


class Target(NamedTuple):
    """A target, whether it can be used here, and if not why."""

    name: str
    available: bool
    why_not: str


def targets() -> list[Target]:
    """List every target."""
    return [_describe(name) for name in (*BASELINES, *ARTIFACT_TARGETS)]


def _describe(name: str) -> Target:
    if name == "inductor":
        import torch._inductor.exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except (RuntimeError, torch._inductor.exc.InvalidCxxCompiler):
            return Target(name, False, "it compiles C++ and no compiler was found: install g++ or clang++")
    packages, extra = _NEEDS.get(name, ((), ""))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        return Target(name, False, f'{missing[0]} is not installed: pip install "xformopt[{extra}]"')
    if name == "ort-cuda":
        from xformopt.lowering.ort_session import missing_provider

        if why_not := missing_provider(name):
            return Target(name, False, why_not)
    if name == "triton-cuda":
        from xformopt.lowering.triton_build import missing_for_gpu

        if why_not := missing_for_gpu():
            return Target(name, False, why_not)
    if name.startswith("tvm-"):
        from xformopt.lowering.tvm_build import missing_linker

        if why_not := missing_linker(name):
            return Target(name, False, why_not)
    return Target(name, True, "")
