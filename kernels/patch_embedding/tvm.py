"""TVM kernel of ``xf.patch_embedding``: patches as rows, then the product of ``xf.linear``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xformopt.kernels.linear.tvm import emit_product
from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import write_function

__all__ = ["KERNEL", "patches"]


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    dtypes = {arguments["image"].dtype, arguments["weight"].dtype}
    return None if dtypes == {torch.float32} else "it is not in fp32"


def _emit(b: Builder, node: TvmNode) -> Any:
    image, patch = node.shape_of("image"), node.shape_of("weight")[2:]
    shape = (*node.shape[:2], image[1] * patch[0] * patch[1])
    name = "_".join(["patches", *map(str, (*image, *patch))])
    rows = b.call(name, lambda: patches(image, patch), [b.value(node.arguments["image"])], shape)
    return emit_product(b, rows, shape, node.arguments["weight"], node.arguments["bias"], node.shape)


def patches(image_shape: tuple[int, ...], patch: tuple[int, ...]) -> Any:
    """Return the function that lays an image ``[B, C, H, W]`` out as ``[B, patches, C height width]``."""
    from tvm.script.ir_builder import tirx as ir

    batch, channels, *size = image_shape
    height, width = patch
    down, across = size[0] // height, size[1] // width

    def body(image: Any, rows: Any) -> None:
        image, rows = ir.buffer_proxy(image), ir.buffer_proxy(rows)
        with ir.parallel(0, batch * down * across) as task:
            n, place = task // (down * across), task % (down * across)
            with ir.serial(0, channels * height) as line, ir.vectorized(0, width) as j:
                top, left = place // across * height, place % across * width
                rows[n, place, line * width + j] = image[n, line // height, top + line % height, left + j]

    inner = channels * height * width
    return write_function([("image", image_shape, "float32"), ("rows", (batch, down * across, inner), "float32")], body)


KERNEL = Kernel(_emit, _accepts)
