"""What a MODEL string becomes before export: a torch module and everything capture must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from xformopt.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

__all__ = ["Dim", "Dynamic", "Source", "check_finite", "check_finite_tensors"]

Dim: TypeAlias = str | tuple[str, int, int]
Dynamic: TypeAlias = dict[str, dict[int, Dim]]
Named: TypeAlias = "Iterable[tuple[str, torch.Tensor]]"


@dataclass(frozen=True, eq=False)
class Source:
    """A module ready to be exported.

    Attributes:
        module: In eval mode, with no parameter that requires a gradient.
        example_inputs: Tensors keyed by the forward's parameter names, in the forward's order.
        dynamic: For each input, axis -> dimension name, or ``(name, smallest, largest)`` where the model
            bounds it. Equal names mean equal sizes. None leaves the choice to the exporter.
        output_names: Names of the tensors the module returns, in order; None if it does not name them.
        description: What was loaded, in a few words.
        files: Tokenizer, processor and config files that belong beside an artifact.
        notes: What the user should be told about how the module was loaded.

    """

    module: torch.nn.Module
    example_inputs: dict[str, torch.Tensor]
    dynamic: Dynamic | None
    output_names: tuple[str, ...] | None
    description: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def check_finite(module: torch.nn.Module, where: str) -> None:
    """Refuse NaN or infinite parameters and NaN buffers of a module; see `check_finite_tensors`."""
    check_finite_tensors(module.named_parameters(), module.named_buffers(), where)


def check_finite_tensors(parameters: Named, buffers: Named, where: str) -> None:
    """Refuse NaN or infinite parameters and NaN buffers.

    Infinite buffers are legal: masks are filled with minus infinity.

    Raises:
        CaptureError: Naming the first bad tensor, how many of its values are bad, and how many tensors are.

    """
    bad = [
        (kind, name, count, tensor.numel())
        for kind, tensors in (("parameter", parameters), ("buffer", buffers))
        for name, tensor in tensors
        if (count := _count_bad(tensor, infinite_too=kind == "parameter"))
    ]
    if not bad:
        return
    kind, name, count, total = bad[0]
    others = f"; {len(bad) - 1} more tensors are affected" if len(bad) > 1 else ""
    what = "NaN or infinite" if kind == "parameter" else "NaN"
    raise CaptureError(
        f'The {kind} "{name}" of {where} holds {count} of {total} values that are {what}{others}. '
        "Nothing computed from it can be verified: use a checkpoint whose weights are finite."
    )


def _count_bad(tensor: torch.Tensor, *, infinite_too: bool) -> int:
    import torch

    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    bad = ~torch.isfinite(tensor) if infinite_too else torch.isnan(tensor)
    return int(bad.sum())
