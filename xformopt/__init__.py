"""xformopt: a compiler for transformer-like models.

    import xformopt as xo
    program = xo.capture(model, example_inputs)
    result = xo.Pipeline.recipe("exact").run(program, target="ort-cpu")
    artifact = xo.lower(result.program, target="ort-cpu")

Names are imported when first used, so that ``import xformopt`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "optimize": "xformopt.api",
    "Artifact": "xformopt.lowering",
    "Context": "xformopt.pipeline",
    "Pass": "xformopt.pipeline",
    "PassResult": "xformopt.pipeline",
    "Pipeline": "xformopt.pipeline",
    "PipelineResult": "xformopt.pipeline",
    "Program": "xformopt.program",
    "Reject": "xformopt.rewrite",
    "RewritePass": "xformopt.pipeline",
    "XformoptError": "xformopt.errors",
    "bench": "xformopt.api",
    "capture": "xformopt.capture",
    "load": "xformopt.lowering",
    "lower": "xformopt.lowering",
}
__all__ = [*sorted(_WHERE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'xformopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    # xformopt.capture is also a package: the function must win once both are loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
