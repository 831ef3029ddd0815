"""The ONNX form of ``xf.pack_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def gather(b: Builder, node: XfNode) -> ir.Value:
    """Whole rows of all sequences put end to end; where there is one for all, its places repeat."""
    x, places = node["x"], node["places"]
    if node.shape("x")[0] == 1:
        return b.op("Gather", x, b.op("Mod", places, b.size(x, 1)), axis=1)
    return b.op("Gather", b.reshape(x, 1, -1, 0), places, axis=1)


FORMS = (Form("gather", gather, is_standard=True),)
