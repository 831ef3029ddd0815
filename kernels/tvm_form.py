"""What a TVM kernel of an operator is, and the builder that calls it.

``kernels/<operator>/tvm.py`` holds ``KERNEL``: whether it takes a node, and how it emits it.  An operator without that
file, or a node that its kernel declines, becomes the ATen operators of its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import fx

__all__ = ["Builder", "Kernel", "Machine", "Tile", "Trial", "TvmNode", "Verdict"]

# why a kernel cannot express a node, or None where it can
Verdict: TypeAlias = str | None
# TVM's values (relax.Expr) and functions (tirx.PrimFunc) have no types of their own
Value: TypeAlias = Any
# how TVM's fusion marks a function that nothing is fused into
_OPAQUE = 8


@dataclass(frozen=True)
class Machine:
    """What a schedule needs to know of the processor.

    Attributes:
        lanes: How many fp32 numbers one vector register holds.
        registers: How many vector registers there are.
        dot: How it adds products of 8-bit integers: ``vnni`` (AVX-512), ``madd`` (AVX2), ``sdot`` (Arm), or ``plain``.

    """

    lanes: int
    registers: int
    dot: str = "plain"


class Tile(NamedTuple):
    """The part of a product that stays in registers: ``rows x columns``."""

    rows: int
    columns: int

    @staticmethod
    def fitted(height: int, width: int, rows: int, columns: int) -> Tile:
        """Return a tile that is never larger than the product."""
        return Tile(min(height, rows), min(width, columns))

    @staticmethod
    def of(machine: Machine, rows: int, columns: int) -> Tile:
        """Return the tile to take unmeasured: two vectors wide, and as high as leaves few rows to compute twice."""
        highest = (machine.registers - 4) // 2
        heights = range(min(4, rows), min(rows, highest) + 1)
        height = min(heights, key=lambda height: -(-rows // height) * height / rows * (1 + 0.4 / height))
        return Tile.fitted(height, 2 * machine.lanes, rows, columns)

    def waste(self, rows: int, columns: int) -> float:
        """Return the share of a product that is computed in vain."""
        done = -(-rows // self.rows) * self.rows * -(-columns // self.columns) * self.columns
        return done / (rows * columns) - 1


@dataclass(frozen=True)
class Trial:
    """A function with several tiles to choose from by measurement.

    Attributes:
        make: Writes the function with one of them.
        default: What is taken where nothing was measured.
        tiles: The others, the most promising first.

    """

    make: Callable[[Tile], Any]
    default: Tile
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Kernel:
    """How one operator is written for TVM.

    Attributes:
        emit: Emits the node and returns its value.
        accepts: Takes the arguments of the node by the names of its schema (fake tensors of fixed shape, and plain
            values); says why it cannot be expressed, or None where it can.

    """

    emit: Callable[[Builder, TvmNode], Value]
    accepts: Callable[[Mapping[str, Any]], Verdict] = lambda arguments: None


@dataclass(frozen=True)
class TvmNode:
    """One xf operator of a traced graph, its arguments by the names of its schema.

    ``shape`` is that of its first result, ``other_shapes`` those of the others.
    """

    operator: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    other_shapes: tuple[tuple[int, ...], ...] = ()

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an operand."""
        return tuple(int(size) for size in self.arguments[name].meta["val"].shape)


@dataclass
class Builder:
    """Calls kernels in the function that is being built.

    Attributes:
        machine: What schedules are chosen for.
        block_builder: TVM's own.
        value: Returns the value of a node of the traced graph.
        constants: The parameters of the Program, by the traced graph's nodes.
        tiles: What measurement chose, by function.
        shared: Values that several nodes need, by key.
        packed: Arrays that kernels derived from parameters, by key; passed to the function like parameters.
        trials: The functions called so far that have a choice of tiles.

    """

    machine: Machine
    block_builder: Any
    value: Callable[[fx.Node], Value]
    constants: Mapping[fx.Node, torch.Tensor]
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    shared: dict[str, Value] = field(default_factory=dict)
    packed: dict[str, tuple[Value, np.ndarray]] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    _functions: dict[str, Any] = field(default_factory=dict)

    def parameter(self, key: str, compute: Callable[[], np.ndarray]) -> Value:
        """Return a parameter with the array that ``compute`` gives, once for each key."""
        from tvm import relax

        if key not in self.packed:
            array = np.ascontiguousarray(compute())
            variable = relax.Var(f"packed_{len(self.packed)}", relax.TensorType(array.shape, array.dtype.name))
            self.packed[key] = variable, array
        return self.packed[key][0]

    def once(self, key: str, emit: Callable[[], Value]) -> Value:
        """Return the value that ``emit`` emits, once for each key."""
        if key not in self.shared:
            self.shared[key] = emit()
        return self.shared[key]

    def reshape(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Return a value under another shape."""
        from tvm import relax

        return self.block_builder.emit(relax.op.reshape(value, shape))

    def tile(self, name: str, make: Callable[[Tile], Any], default: Tile, others: Sequence[Tile]) -> Tile:
        """Return the tile that was measured to be best for the function ``name``, or else ``default``."""
        self.trials.setdefault(name, Trial(make, default, tuple(tile for tile in others if tile != default)))
        return self.tiles.get(name, default)

    def call(
        self,
        name: str,
        make: Callable[[], Any],
        operands: list[Value],
        *shapes: tuple[int, ...],
        dtype: str = "float32",
    ) -> Value:
        """Call the function named ``name`` on ``operands``; ``make`` writes it when the name is new.

        The function is written to the end: nothing is fused into it, and no default schedule applied.  It returns one
        value of ``dtype`` for each of ``shapes``; several as a tuple.
        """
        from tvm import relax

        if name not in self._functions:
            written = make().without_attr("global_symbol").with_attr("op_pattern", _OPAQUE)
            written = written.with_attr("tirx.is_scheduled", True)
            self._functions[name] = self.block_builder.add_func(written, name)
        results = [relax.TensorType(shape, dtype) for shape in shapes]
        called = relax.call_tir(self._functions[name], operands, results if len(results) > 1 else results[0])
        return self.block_builder.emit(called)
