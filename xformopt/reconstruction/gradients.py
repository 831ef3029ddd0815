"""Which parameters a gradient reaches, and which operator stands in its way to the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from xformopt.program import Program
from xformopt.program.text import target_name
from xformopt.reconstruction.blocks import cut_at
from xformopt.reconstruction.values import run_block

__all__ = ["stopped_gradients"]


def stopped_gradients(
    program: Program, inputs: Mapping[str, torch.Tensor], names: Collection[str], *, seed: int = 0
) -> dict[str, str]:
    """Return the parameters that no gradient reaches from the outputs, each with the operator that stops it.

    Every floating-point output is multiplied by random numbers, and the sum differentiated by all parameters: what
    rounds or chooses gives no gradient, or zeros only.

    Args:
        program: At any level.
        inputs: One batch.
        names: The parameters in question, of floating point.
        seed: Of the random numbers.

    Returns:
        The operator's name as printed, by the name of the parameter; empty where no output reads it.

    """
    leaves = {name: program.parameters[name].detach().clone().requires_grad_() for name in names}
    kept: dict[fx.Node, torch.Tensor] = {}

    def keep(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.retain_grad()
            kept[node] = value
        return value

    (block,) = cut_at(program, [])
    found = run_block(program, block, inputs, leaves, transform=keep)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for value in found.values():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            total = total + (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum()
    if total.requires_grad:
        total.backward()
    reached = {node for node, value in kept.items() if _is_felt(value)} | set(program.results)
    readers = {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}
    return {name: _stopper(readers[name], reached) for name, leaf in leaves.items() if not _is_felt(leaf)}


def _is_felt(value: torch.Tensor) -> bool:
    return value.grad is not None and bool(value.grad.count_nonzero())


def _stopper(start: fx.Node, reached: Collection[fx.Node]) -> str:
    """Return the first operator behind a value that a gradient reaches, though it does not reach the value."""
    pending, seen = [start], {start}
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if user in reached and user.op == "call_function":
                return target_name(user.target)
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return ""
