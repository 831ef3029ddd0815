"""Triton kernel of ``xf.activation``, and the plan it shares with ``xf.glu``."""

from __future__ import annotations

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Rows, Verdict, room_for, rows_of, tiles

__all__ = ["KERNEL", "gated"]

# columns of a program
_COLUMNS = 1024


def gated(gate: torch.Tensor, up: torch.Tensor | None, function: str) -> Plan:
    """Plan ``function(gate) * up``; halves of one tensor are read where they are."""
    from xformopt.kernels.triton_rows import activation_rows

    out, result = room_for(gate, *gate.shape)
    # without gaps it is one row
    is_flat = gate.is_contiguous() and (up is None or up.is_contiguous())
    width = gate.numel() if is_flat else gate.shape[-1]
    gates = Rows(gate, 1, width) if is_flat else rows_of(gate, width)
    factors = None if up is None else Rows(up, 1, width) if is_flat else rows_of(up, width)
    blocks = tiles(width, _COLUMNS)
    arguments = {
        **{
            "gate": gates.data,
            "up": None if factors is None else factors.data,
            "out": out,
            "blocks": blocks,
            "width": width,
        },
        **{"gate_row": gates.stride, "up_row": 0 if factors is None else factors.stride},
    }
    constants = {"FUNCTION": function, "N": _COLUMNS}
    return Plan((Launch(activation_rows, (gates.count * blocks,), arguments, constants, 4, 1),), result)


def _plan(x: torch.Tensor, *, function: str) -> Plan:
    return gated(x, None, function)


def _accepts(x: torch.Tensor, *, function: str) -> Verdict:
    return None if x.dtype in FLOATS else f"it is in {x.dtype}"


KERNEL = Kernel(_plan, _accepts)
