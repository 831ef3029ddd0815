"""Passes and the pipeline that runs, verifies and records them."""

from __future__ import annotations

from xformopt.pipeline.base import Context, Effect, Pass, PassResult, RewritePass, pass_name

__all__ = ["Context", "Effect", "Pass", "PassResult", "RewritePass", "pass_name"]
