"""Running the rest of a program again and again, from one changed value on, several changes at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from xformopt.program import Program, interpret
from xformopt.program.interpret import call

__all__ = ["Replay"]


@dataclass
class Replay:
    """One batch's values, kept, so that what does not depend on a change is not computed again.

    Attributes:
        program: What runs.
        batch: Its inputs.
        values: Every value, by node.

    """

    program: Program
    batch: Mapping[str, torch.Tensor]
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = self.program.bind(self.batch)
        self.outputs = interpret(self.program, self.batch, observe=self.values.__setitem__)
        firsts = {spec.shape[0] for spec in self.program.inputs if spec.shape}
        first = firsts.pop() if len(firsts) == 1 else None
        self.batch_dim = first if isinstance(first, str) else None

    def most(self, wanted: int) -> int:
        """Return how many changes can run at a time: ``wanted``, or one where the batch is fixed."""
        return wanted if self.batch_dim is not None else 1

    def run(
        self, changed: fx.Node, value: torch.Tensor, count: int, wanted: Collection[fx.Node]
    ) -> dict[fx.Node, torch.Tensor]:
        """Return the values of ``wanted`` where ``changed`` has another value.

        Args:
            changed: The node whose value is replaced.
            value: ``count`` values for it, one after the other on the batch axis.
            count: How many.
            wanted: Nodes to return; those that do not depend on the change come repeated.

        """
        found: dict[fx.Node, Any] = {changed: value}
        repeated: dict[fx.Node, Any] = {}

        def read(node: fx.Node) -> Any:
            if node in found:
                return found[node]
            if node not in repeated:
                repeated[node] = self._repeat(node, count)
            return repeated[node]

        last = max(wanted)
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node > last:
                    break
                if node is not changed and any(argument in found for argument in node.all_input_nodes):
                    found[node] = call(node.target, fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read))
        return {node: read(node) for node in wanted}

    def _repeat(self, node: fx.Node, count: int) -> Any:
        """Return a kept value for a batch that is ``count`` times as large."""
        value, known = self.values[node], node.meta["val"]
        if count == 1:
            return value
        dims = self.program.dims
        if isinstance(known, torch.SymInt):
            assert self.batch_dim is not None
            larger = {**self.sizes, self.batch_dim: self.sizes[self.batch_dim] * count}
            return dims.evaluate(dims.expression(known), larger)
        if isinstance(value, list | tuple):
            return [self._repeat_tensor(part, fake, count) for part, fake in zip(value, known, strict=True)]
        return self._repeat_tensor(value, known, count) if isinstance(value, torch.Tensor) else value

    def _repeat_tensor(self, value: torch.Tensor, known: torch.Tensor, count: int) -> torch.Tensor:
        times = [count if self._holds_batch(size) else 1 for size in self.program.dims.shape(known)]
        return value.repeat(times) if max(times, default=1) > 1 else value

    def _holds_batch(self, size: object) -> bool:
        return isinstance(size, sympy.Expr) and str(self.batch_dim) in {str(symbol) for symbol in size.free_symbols}
