"""The ONNX form of ``xf.attention_weights``."""

from __future__ import annotations

from xformopt.kernels.attention.onnx import weights_of
from xformopt.kernels.onnx_form import Form

__all__ = ["FORMS"]

FORMS = (Form("matmul_softmax", weights_of, is_standard=True),)
