"""State that one run of a program leaves to the next: inputs ``past_...`` and outputs ``present_...``."""

from __future__ import annotations

import torch
from torch import fx

from xformopt.program import Input, Output, Program
from xformopt.program.dims import Shape
from xformopt.rewrite import Editor, Region

__all__ = ["CarriedState", "empty_region", "state_bytes"]


class CarriedState:
    """The inputs and outputs that are added to a program, which is changed."""

    def __init__(self, program: Program) -> None:
        self.program, self.editor = program, Editor(program)
        self._returned: list[tuple[str, fx.Node]] = []

    def take(self, spec: Input) -> fx.Node:
        """Add an input behind the others."""
        graph = self.program.graph
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            node = graph.placeholder(spec.name)
        node.meta |= {"val": self.program.dims.fake(spec.shape, spec.dtype), "path": ""}
        self.program.inputs = (*self.program.inputs, spec)
        return node

    def past(self, label: str, shape: Shape, dtype: torch.dtype) -> fx.Node:
        """Add what the run before has left, zeros before the first."""
        sizes = tuple(size if isinstance(size, int) else str(size) for size in shape)
        return self.take(Input(f"past_{label}", dtype, sizes, default="zeros"))

    def present(self, label: str, value: fx.Node) -> None:
        """Return a value to the run behind."""
        self._returned.append((f"present_{label}", value))

    def finish(self) -> None:
        """Add all outputs, and what the example inputs lack."""
        output = self.program.output_node
        output.args = ((*self.program.results, *(value for _, value in self._returned)),)
        self.program.outputs = (*self.program.outputs, *(Output(name) for name, _ in self._returned))
        if self.program.example_inputs:
            self.program.example_inputs = dict(self.program.completed(self.program.example_inputs))


def state_bytes(program: Program) -> int:
    """Count the bytes of one stream's state, every size but the batch being fixed."""
    specs = [spec for spec in program.inputs if spec.default == "zeros"]
    total = 0
    for spec in specs:
        elements = spec.dtype.itemsize
        for size in spec.shape[1:]:
            assert isinstance(size, int)
            elements *= size
        total += elements
    return total


def empty_region() -> Region:
    """Return an empty region: values before and after are not to be compared one by one."""
    graph = fx.Graph()
    graph.output(())
    return Region(graph, (), (), {})
