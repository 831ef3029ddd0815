"""Passes and the pipeline that runs, verifies and records them."""

from __future__ import annotations

from xformopt.pipeline.base import Context, Effect, Pass, PassResult, RewritePass, pass_name
from xformopt.pipeline.run import Lift, Pipeline, PipelineResult, Record

__all__ = [
    "Context",
    "Effect",
    "Lift",
    "Pass",
    "PassResult",
    "Pipeline",
    "PipelineResult",
    "Record",
    "RewritePass",
    "pass_name",
]
