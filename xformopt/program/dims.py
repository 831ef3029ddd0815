"""Named dynamic dimensions: the symbols a Program's shapes are written in, with their ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from xformopt.errors import ProgramError

__all__ = ["Dim", "Dims", "Shape", "Size"]

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]

# sizes at which shapes are inferred: unequal to each other and to what models use, so that no two dimensions
# are taken for equal (and none for 1) by accident
_HINTS = (5, 11, 23, 47, 7, 13, 29, 53, 17, 31)


@dataclass(frozen=True)
class Dim:
    """One dynamic dimension: its name and inclusive range; ``high`` is None when nothing bounds it."""

    name: str
    low: int = 1
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.name} in [{self.low}, {'inf' if self.high is None else self.high}]"

    def admits(self, size: int) -> bool:
        """Whether ``size`` lies in the range."""
        return self.low <= size and (self.high is None or size <= self.high)


class Dims:
    """The dynamic dimensions of one Program and the fake-tensor world in which its shapes are computed.

    Copies of a Program share one ``Dims``: a symbol keeps its meaning across passes.
    """

    def __init__(self, dims: Iterable[Dim]) -> None:
        self._dims = {dim.name: dim for dim in dims}
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self._sizes: dict[str, torch.SymInt] = {}
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        # sizes that depend on data: the largest each can be, and the values they were met in
        self._largest: dict[sympy.Symbol, Size] = {}
        self._met: dict[Hashable, tuple[object, object]] = {}
        for index, dim in enumerate(self._dims.values()):
            self._add(dim, index)

    def extended(self, dim: Dim) -> Dims:
        """Return these dimensions and one more, in the same world: values known before keep their shapes."""
        if dim.name in self:
            raise ProgramError(f"There is a dimension {dim.name!r} already.")
        longer = copy(self)
        longer._dims, longer._sizes, longer._names = dict(self._dims), dict(self._sizes), dict(self._names)
        longer._dims[dim.name] = dim
        longer._add(dim, len(self))
        return longer

    def _add(self, dim: Dim, index: int) -> None:
        hint = _HINTS[index % len(_HINTS)] + 60 * (index // len(_HINTS))
        if not dim.admits(hint):
            hint = dim.low if dim.high is None else min(dim.high, max(dim.low, hint))
        source = ConstantSource(dim.name)
        symbol = self.shape_env.create_symbol(
            hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, positive=True
        )
        size = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        self._sizes[dim.name] = size  # type: ignore[assignment]
        self._names[symbol] = sympy.Symbol(dim.name, integer=True, positive=True)

    def __iter__(self) -> Iterator[Dim]:
        return iter(self._dims.values())

    def __getitem__(self, name: str) -> Dim:
        return self._dims[name]

    def __contains__(self, name: object) -> bool:
        return name in self._dims

    def __len__(self) -> int:
        return len(self._dims)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in declaration order."""
        return tuple(self._dims)

    @property
    def hints(self) -> dict[str, int]:
        """A size for every dimension, unequal to each other: those at which shapes are inferred."""
        return {name: int(size.node.hint) for name, size in self._sizes.items()}

    def fake(self, shape: Sequence[int | str], dtype: torch.dtype) -> torch.Tensor:
        """Return a fake tensor whose named sizes are this Program's symbols."""
        sizes = [self._sizes[size] if isinstance(size, str) else size for size in shape]
        with self.mode:
            return torch.empty(sizes, dtype=dtype)

    def expression(self, size: int | torch.SymInt) -> Size:
        """Return ``size`` as an int, or as an expression in dimension names."""
        if isinstance(size, int):
            return size
        # a dimension that met an equation is replaced by its solution before it is named
        expression = self.shape_env.replace(size.node.expr).xreplace(self._names)
        return int(expression) if expression.is_Integer else expression

    def shape(self, value: torch.Tensor) -> Shape:
        """Return the shape of a fake tensor in dimension names."""
        return tuple(self.expression(size) for size in value.shape)

    def remember(self, key: Hashable, held: object, largest: torch.SymInt | int, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` infers for an operator whose result has sizes that depend on data.

        The same operator on the same values has the same sizes, however often it is inferred.

        Args:
            key: What is inferred: the operator, its operands by identity, its attributes.
            held: What must live on for ``key`` to stay unique.
            largest: What such a size is at most.
            compute: Infers the result, with sizes of its own.

        """
        if key not in self._met:
            value = compute()
            self._met[key] = (held, value)
            for symbol in free_unbacked_symbols(value):
                self._largest.setdefault(symbol, self.expression(largest))
        return self._met[key][1]

    def evaluate(self, size: Size, sizes: Mapping[str, int]) -> int:
        """Return the value of ``size`` where every dimension has the given size.

        A size that depends on data counts as the largest it can be.
        """
        if isinstance(size, int):
            return size
        return int(
            size.subs(self._largest).subs({sympy.Symbol(n, integer=True, positive=True): v for n, v in sizes.items()})
        )

    def specialized(self) -> dict[str, Size]:
        """Return the dimensions that shape inference found to be fixed or tied, with what they equal."""
        found: dict[str, Size] = {}
        for name, size in self._sizes.items():
            expression = self.expression(size)
            if str(expression) != name:
                found[name] = expression
        return found

    def check_sizes(self, sizes: Mapping[str, int], where: str) -> None:
        """Raise ProgramError when a size lies outside its dimension's range."""
        for name, size in sizes.items():
            if not self[name].admits(size):
                raise ProgramError(f"{where}: {name} is {size}, outside of {self[name]}.")

    def largest(self, name: str, cap: int) -> int:
        """Return the largest size of dimension ``name``, at most ``cap``."""
        high = self[name].high
        return cap if high is None else min(cap, high)

    @staticmethod
    def parse_high(text: str) -> int | None:
        """Read an upper bound as printed: a number or ``inf``."""
        return None if text in ("inf", str(math.inf)) else int(text)
