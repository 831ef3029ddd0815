"""The ONNX form of ``xf.attention_values``."""

from __future__ import annotations

from xformopt.kernels.attention.onnx import values_of
from xformopt.kernels.onnx_form import Form

__all__ = ["FORMS"]

FORMS = (Form("matmul", values_of, is_standard=True),)
