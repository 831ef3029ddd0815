"""The values between blocks on calibration data: kept from where they are computed to where they are last read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from xformopt.kernels.definition import find_operator
from xformopt.program import Program
from xformopt.program.interpret import call
from xformopt.reconstruction.blocks import Block

__all__ = ["Store", "Transform", "run_block"]

# called with every operator and its value; returns the value to go on with
Transform = Callable[[fx.Node, Any, Mapping[fx.Node, Any]], Any]


class Store:
    """Named values of every batch: in memory up to a limit, beyond it in files that are mapped into memory."""

    def __init__(self, limit: int) -> None:
        self.room = limit
        self._kept: dict[tuple[int, str], Any] = {}
        self._files: dict[tuple[int, str], Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, batch: int, name: str, value: Any) -> None:
        """Keep a value."""
        key = (batch, name)
        if isinstance(value, torch.Tensor):
            value = value.detach()
            size = value.numel() * value.element_size()
            if size > self.room and size:
                value = self._mapped(key, value)
            else:
                self.room -= size
        self._kept[key] = value

    def get(self, batch: int, name: str) -> Any:
        """Return a value."""
        return self._kept[batch, name]

    def drop(self, name: str) -> None:
        """Forget a value of all batches."""
        for key in [key for key in self._kept if key[1] == name]:
            value = self._kept.pop(key)
            if (file := self._files.pop(key, None)) is not None:
                file.unlink()
            elif isinstance(value, torch.Tensor):
                self.room += value.numel() * value.element_size()

    def names(self) -> Iterator[str]:
        """Yield the names of what is kept."""
        return iter(dict.fromkeys(name for _, name in self._kept))

    def _mapped(self, key: tuple[int, str], value: torch.Tensor) -> torch.Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="xformopt-")
        file = Path(self._folder.name) / f"{key[0]}-{len(self._files)}-{key[1]}"
        held = torch.from_file(str(file), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        held.copy_(value)
        self._files[key] = file
        return held


def run_block(
    program: Program,
    block: Block,
    given: Mapping[str, Any],
    parameters: Mapping[str, torch.Tensor] | None = None,
    *,
    transform: Transform | None = None,
    double: bool = False,
) -> dict[str, Any]:
    """Execute one block on values by name, and return its outputs; differentiable.

    Args:
        program: The block's.
        block: Which part of it.
        given: Values of the block's inputs.
        parameters: Take the place of parameters of those names.
        transform: Called with each operator, its value and the values before it; its result takes the value's place.
        double: Compute in float64; ``given`` must be in float64 already.

    """
    known = {**program.parameters, **(parameters or {})}
    widen = _widened if double else lambda value: value
    chosen = set(block.nodes)
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            values[node] = widen(known[str(node.target)])
        elif node.name in given:
            values[node] = given[node.name]
        elif node.name in chosen:
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = {name: widen(fx.map_arg(value, values.__getitem__)) for name, value in node.kwargs.items()}
            value = _execute(node, args, kwargs)
            values[node] = value if transform is None else transform(node, value, values)
    return {node.name: value for node, value in values.items() if node.name in block.outputs}


def _execute(node: fx.Node, args: Any, kwargs: Any) -> Any:
    # differentiating the reference itself saves the registered operator's second forward pass
    defined = find_operator(node.target)
    return call(node.target, args, kwargs) if defined is None else defined.reference(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if value is torch.float32 else value
