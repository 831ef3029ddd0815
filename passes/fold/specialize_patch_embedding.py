"""Write the patch embedding of images of one size as a matrix product.

    patch_embedding(image, W, b)    ->    linear(rows of patches, W as a matrix, b)

**Exact**: the convolution's stride is its kernel, so every pixel meets every weight once.  Which form is faster depends
on the target; this pass is for those where it is the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program, shape_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["SpecializePatchEmbedding"]

aten = torch.ops.aten


@dataclass(frozen=True)
class SpecializePatchEmbedding(RewritePass):
    """Turn patch embeddings into a reordering of pixels and a linear layer."""

    sources: ClassVar[tuple[str, ...]] = ("Dosovitskiy et al., arXiv 2010.11929",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule."""
        return (_specialize_patch_embedding,)


def _specialize_patch_embedding(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not is_call(node, xf.patch_embedding):
        return None
    given = arguments(node)
    weight = editor.constant(given["weight"])
    if weight is None:
        return Reject("the weight is computed, not a parameter")
    if len(given["weight"].users) > 1:
        return Reject(f"the weight {given['weight'].target} has other readers and would be stored twice")
    _, channels, height, width = shape_of(editor.program, given["image"])
    if not isinstance(height, int) or not isinstance(width, int):
        return Reject(f"the size of the image varies ({height} x {width})")
    rows = _patch_rows(editor, given["image"], (int(channels), height, width), tuple(weight.shape[2:]))
    matrix = editor.parameter(str(given["weight"].target), weight.flatten(1).contiguous())
    bias = () if given["bias"] is None else (given["bias"],)
    return editor.call(xf.linear, rows, matrix, *bias)


def _patch_rows(editor: Editor, image: fx.Node, sizes: tuple[int, int, int], patch: tuple[int, ...]) -> fx.Node:
    """Return ``[B, patches, C * P * Q]``: the pixels of every patch in the order of the kernel."""
    C, H, W = sizes
    P, Q = patch
    for axis, size, step in ((2, H, P), (3, W, Q)):
        if size % step:
            image = editor.call(aten.slice.Tensor, image, axis, 0, size // step * step)
    grid = editor.call(aten.reshape.default, image, [-1, C, H // P, P, W // Q, Q])
    ordered = editor.call(aten.permute.default, grid, [0, 2, 4, 1, 3, 5])
    return editor.call(aten.reshape.default, ordered, [-1, (H // P) * (W // Q), C * P * Q])
