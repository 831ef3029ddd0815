"""What the ONNX forms share of attention whose queries are gathered, by a choice that depends on the input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, XfNode
from xformopt.kernels.onnx_softmax import bounded

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GatheredAttention"]

_UINT8 = 2  # TensorProto.UINT8


@dataclass
class GatheredAttention:
    """Writes one node, whose operands are those of ``xf.attention``, one key and value for each query.

    ``u`` (in shapes) is how many queries of each head are chosen.
    """

    b: Builder
    node: XfNode

    def ints(self, *values: int) -> ir.Value:
        """Return integers as a tensor with one axis."""
        return self.b.constant(values, np.int64)

    def depth(self, name: str) -> int:
        """Return the width of a head."""
        return self.node.size(name, -1) // int(self.node["heads"])

    @cached_property
    def length(self) -> ir.Value:
        """T, as a tensor of one element."""
        return self.b.size(self.node["q"], 1)

    @cached_property
    def queries(self) -> ir.Value:
        """The scaled queries, ``[B, H, T, D]``."""
        return self.heads(self.b.op("Mul", self.node["q"], self.b.scalar(self.node["scale"], self.node["q"])), "q")

    @cached_property
    def keys(self) -> ir.Value:
        """The keys, ``[B, H, T, D]``."""
        return self.heads(self.node["k"], "k")

    @cached_property
    def values(self) -> ir.Value:
        """The values, ``[B, H, T, E]``."""
        return self.heads(self.node["v"], "v")

    @cached_property
    def exists(self) -> ir.Value | None:
        """Which tokens exist, ``[B, T]`` as bytes; None: all."""
        mask = self.node["key_mask"]
        return None if mask is None else self.b.op("Cast", mask, to=_UINT8)

    @cached_property
    def bias(self) -> ir.Value | None:
        """The bias without infinities."""
        return None if self.node["bias"] is None else bounded(self.b, self.node["bias"], self.node["q"])

    @cached_property
    def start(self) -> ir.Value:
        """The number of the first query of each head, ``[B, H, 1]``."""
        every = self.b.reshape(self.numbers(self.node["heads"]), -1, self.node["heads"], 1)
        return self.b.op("Mul", every, self.length)

    def rows(self, x: ir.Value, name: str, numbers: ir.Value) -> ir.Value:
        """Return the rows of ``[B, H, T, .]`` that have these numbers among those of all heads, ``[B, H, u, .]``."""
        return self.b.op("Gather", self.b.reshape(x, -1, self.depth(name)), numbers, axis=0)

    def rows_of_bias(self, chosen: ir.Value) -> ir.Value:
        """Return the row of each chosen query in the bias, whose batch or heads may be one, ``[B, H or 1, u]``."""
        b, (batch, heads) = self.b, self.node.shape("bias")[:2]
        rows = chosen
        if heads != 1:
            each = b.constant(np.arange(self.node["heads"]).reshape(1, -1, 1), np.int64)
            rows = b.op("Add", rows, b.op("Mul", each, self.length))
        if batch != 1:
            items = b.op(
                "Mul", b.reshape(self.numbers(1), -1, 1, 1), self.ints(1 if heads == 1 else self.node["heads"])
            )
            rows = b.op("Add", rows, b.op("Mul", items, self.length))
        return rows

    def heads(self, x: ir.Value, name: str) -> ir.Value:
        """Turn ``[B, T, H * D]`` into ``[B, H, T, D]``; ``name`` is the operand as wide as it."""
        apart = self.b.reshape(x, 0, 0, self.node["heads"], self.depth(name))
        return self.b.op("Transpose", apart, perm=[0, 2, 1, 3])

    def joined(self, x: ir.Value) -> ir.Value:
        """Turn ``[B, H, T, E]`` into ``[B, T, H * E]``."""
        return self.b.reshape(self.b.op("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, self.node.size("v", -1))

    def numbers(self, each: int) -> ir.Value:
        """Return 0, 1, ... for ``each`` of every item of the batch."""
        b = self.b
        end = b.op("Squeeze", b.op("Mul", b.size(self.node["q"], 0), self.ints(each)))
        return b.op("Range", b.constant(0, np.int64), end, b.constant(1, np.int64))
