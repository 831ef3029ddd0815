"""What a Triton kernel of an operator is, and how it becomes a torch operator.

``kernels/<operator>/triton.py`` holds ``KERNEL``: whether it takes the operands, and its *plan*, the launches that
compute the result.  A plan is data: the torch operator runs it, tests fill its outputs first, and
``tools/compile_kernels.py`` compiles it for GPUs that are not there.  Code in Triton's own language is in
``kernels/triton_<subject>.py``, which need Triton when they are imported: inside of functions only.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch

from xformopt.kernels.definition import Operator, load_operators

__all__ = [
    "FLOATS",
    "Kernel",
    "Launch",
    "Plan",
    "Rows",
    "Tile",
    "Trial",
    "Verdict",
    "load_kernels",
    "power_of_two",
    "room_for",
    "rows_of",
    "tile_of",
    "tiles",
    "use_tiles",
]

# why a kernel does not take the operands, or None where it does
Verdict: TypeAlias = str | None
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: What ``triton.jit`` returned.
        grid: How many programs, along up to three axes; may be symbolic.
        arguments: Tensors, numbers, and None for operands that there are not.  Triton passes numbers in 32 bits where
            they fit, AOTInductor in 64: a kernel casts a fraction to float32 before it multiplies by it.
        constants: What the kernel is compiled for.
        warps: Warps of a program.
        stages: How many blocks of a loop are loaded ahead.

    """

    kernel: Any
    grid: tuple[Any, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        """Launch it, or record it where the torch operator is being traced."""
        given = {**self.arguments, **self.constants, "num_warps": self.warps, "num_stages": self.stages}
        torch.library.wrap_triton(self.kernel)[self.grid](**given)


@dataclass(frozen=True)
class Plan:
    """The launches of one call.

    Attributes:
        launches: In order.
        result: A tensor or a tuple of them, written when all are done.
        scratch: What launches leave to later ones.

    """

    launches: tuple[Launch, ...]
    result: Any
    scratch: tuple[torch.Tensor, ...] = ()

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """The result as a tuple."""
        return self.result if isinstance(self.result, tuple) else (self.result,)

    def spoil(self) -> None:
        """Fill what launches write with NaN, and integers with their largest: what is left out shows in the result."""
        for tensor in (*self.results, *self.scratch):
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def run(self) -> Any:
        """Launch everything and return the result."""
        for launch in self.launches:
            launch.run()
        return self.result


class Tile(NamedTuple):
    """A block of ``M`` by ``N``, its warps, how many blocks are on their way at once, and the depth ``K`` of a product.

    Of attention, ``M`` queries and ``N`` keys; of a linear layer, ``M`` rows and ``N`` output channels.
    """

    M: int
    N: int
    warps: int
    stages: int
    K: int = 0


@dataclass(frozen=True)
class Trial:
    """A choice of tiles that a machine answers by measurement.

    Attributes:
        key: The operator, the dtype and the widths of a head or a layer: never a length, which differs between calls.
        tiles: What there is to choose from, the default first.
        operands: Makes operands to time it on, on a device: arguments by place and by name.

    """

    key: str
    tiles: tuple[Tile, ...]
    operands: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]


_CHOSEN: ContextVar[Mapping[str, Tile]] = ContextVar("chosen tiles", default={})  # noqa: B039 (never changed)


@contextmanager
def use_tiles(chosen: Mapping[str, Tile]) -> Iterator[None]:
    """Let plans made inside take these tiles, by the keys of trials, instead of their defaults."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def tile_of(key: str, default: Tile) -> Tile:
    """Return the tile chosen for ``key``, or the default."""
    return _CHOSEN.get().get(key, default)


@dataclass(frozen=True)
class Kernel:
    """How one operator is computed on a GPU.

    Attributes:
        plan: Takes the arguments of the operator, on any device; allocates the result, launches nothing.
        accepts: Takes the same (fake tensors, maybe of symbolic sizes); says why there is no kernel for them.
        trial: Takes the same; the choice of tiles they lead to.  None: the kernel has no choice.
        capability: The least compute capability of a GPU that runs it.

    """

    plan: Callable[..., Plan]
    accepts: Callable[..., Verdict]
    trial: Callable[..., Trial] | None = None
    capability: tuple[int, int] = (8, 0)


@cache
def load_kernels() -> dict[str, Kernel]:
    """Register every kernel as ``xf_triton::<operator>``, with the operator's schema, and return them by name."""
    found = {}
    for name, operator in load_operators().items():
        module = f"xformopt.kernels.{name}.triton"
        if importlib.util.find_spec(module) is not None:
            found[name] = importlib.import_module(module).KERNEL
            _register(operator, found[name])
    return found


def _register(operator: Operator, kernel: Kernel) -> None:
    def compute(*operands: Any, **options: Any) -> Any:
        return kernel.plan(*operands, **options).run()

    # torch reads the schema off the signature: a plan's, but for what it returns
    outputs = len(operator.overload._schema.returns)
    returned: Any = torch.Tensor if outputs == 1 else tuple[(torch.Tensor,) * outputs]  # type: ignore[misc]
    signature = inspect.signature(kernel.plan, eval_str=True).replace(return_annotation=returned)
    compute.__signature__ = signature  # type: ignore[attr-defined]
    torch.library.triton_op(f"xf_triton::{operator.name}", compute, mutates_args=())
    torch.library.register_fake(f"xf_triton::{operator.name}", operator.infer, allow_override=True)


def power_of_two(size: int, least: int = 16) -> int:
    """Return ``size`` rounded up to a power of two, at least ``least``: the sizes a tile may have."""
    return max(least, 1 << (size - 1).bit_length())


def tiles(size: Any, tile: int) -> Any:
    """Return how many tiles hold ``size`` elements; ``size`` may be symbolic."""
    return (size + tile - 1) // tile


def room_for(x: torch.Tensor, *shape: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a new tensor for a kernel to write rows to, and the same as a result of ``shape``.

    What is written has two axes: of as many tokens as only the data tells, strides of three are compared in vain by
    Inductor, which then writes to a copy.
    """
    rows = x.new_empty(math.prod(shape[:-1]), shape[-1])
    return rows, rows.view(shape)


class Rows(NamedTuple):
    """Rows of adjacent columns: where they lie, how many they are, and how far apart; the last two may be symbolic."""

    data: torch.Tensor
    count: Any
    stride: Any


def rows_of(x: torch.Tensor, width: Any) -> Rows:
    """Return the rows of ``width`` columns that ``x`` is made of: itself, a view, or a copy where it must be.

    A tensor without gaps is not viewed anew: of as many tokens as only the data tells, Inductor would copy it.
    """
    if x.is_contiguous():
        return Rows(x, x.numel() // width, width)
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return Rows(rows, rows.shape[0], rows.stride(0))
