"""What a mask says, found by computing it on chosen inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from xformopt.program import Program, shape_of
from xformopt.rewrite import Region, trace_region

__all__ = ["PaddingMask", "evaluate_mask", "mark_the_same", "padding_behind"]

# (name of the input, whether a non-zero entry of it keeps its token or marks padding)
PaddingMask = tuple[str, str]


def evaluate_mask(
    program: Program, region: Region, draw: Callable[[Sequence[int]], torch.Tensor]
) -> torch.Tensor | None:
    """Return where the mask that ``region`` computes from its one input, as drawn, is not zero; None for no mask."""
    node = next(n for n in program.graph.nodes if n.name == region.inputs[0])
    value = node.meta["val"]
    if value.is_floating_point() or value.dim() != 2:
        return None
    hints = {dim.name: min(dim.high or 7, max(dim.low, 3 + 2 * i)) for i, dim in enumerate(program.dims)}
    shape = [program.dims.evaluate(size, hints) for size in shape_of(program, node)]
    module = fx.GraphModule(dict(region.parameters), region.graph)
    with torch.no_grad():
        (mask,) = module(draw(shape).to(value.dtype))
    assert isinstance(mask, torch.Tensor)
    return mask != 0


def padding_behind(program: Program, mask: fx.Node) -> PaddingMask | str:
    """Return what a mask of padding is made of, or why it is none.

    A mask of padding is computed from one input ``[B, T]`` that says of every position whether it counts, and says the
    same of it itself.
    """
    region = trace_region(program, (mask,), ())
    if len(region.inputs) != 1:
        return f"%{mask.name} depends on {', '.join(region.inputs) or 'no input'}, not on one input of padding alone"
    source = region.inputs[0]
    node = next(n for n in program.graph.nodes if n.name == source)
    if shape_of(program, node) != shape_of(program, mask):
        return f"%{mask.name} has not the shape of the input {source}"
    generator = torch.Generator().manual_seed(0)
    drawn: list[torch.Tensor] = []

    def draw(shape: Sequence[int]) -> torch.Tensor:
        drawn.append(torch.randint(0, 2, tuple(shape), generator=generator))
        return drawn[-1]

    means: str | None = None
    for _ in range(3):
        found = evaluate_mask(program, region, draw)
        if found is None:
            return f"the input {source} is no mask"
        meanings = {"keep": found == drawn[-1].bool(), "padding": found != drawn[-1].bool()}
        means = next((name for name, agrees in meanings.items() if bool(agrees.all())), None)
        if means is None:
            return f"%{mask.name} says more of a position than whether {source} marks it as padding"
    assert means is not None
    return source, means


def mark_the_same(program: Program, one: fx.Node, other: fx.Node) -> bool:
    """Whether two masks mark the same padding; models without shared subexpressions compute one for every layer."""
    return one is other or padding_behind(program, one) == padding_behind(program, other)
