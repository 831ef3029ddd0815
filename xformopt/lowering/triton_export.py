"""Program -> an exported program whose hot operators are Triton kernels, the rest ATen, on one device.

What this file needs beside torch is Triton alone, so that a machine with nothing but those can run a program.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.errors import LoweringError, MissingExtraError
from xformopt.kernels.definition import Operator, find_operator
from xformopt.kernels.triton_form import Kernel, Trial, load_kernels
from xformopt.lowering.program_export import explain, export_program
from xformopt.program import Program
from xformopt.program.interpret import call

__all__ = ["KernelProgram", "export_kernels", "require_triton"]

# what these compute with operators of torch holds every logit in memory: a program that means a kernel gets one
_MUST_BE_KERNELS = frozenset({"attention", "attention_packed", "block_sparse_attention"})


@dataclass(frozen=True)
class KernelProgram:
    """An exported program and how its operators are computed.

    Attributes:
        exported: With nodes ``xf_triton.*``; parameters lie on its device.
        forms: By operator, how many nodes are a ``kernel`` and how many run as operators of torch (``aten``).
        refused: Why a kernel did not take an operator, each reason once.
        trials: The choices of tiles, by their keys.

    """

    exported: torch.export.ExportedProgram
    forms: dict[str, dict[str, int]]
    refused: tuple[str, ...]
    trials: dict[str, Trial]


def require_triton(purpose: str) -> None:
    """Raise MissingExtraError unless Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError("triton", "triton", purpose)


def export_kernels(
    program: Program,
    *,
    device: str = "cuda",
    sizes: Mapping[str, int] | None = None,
) -> KernelProgram:
    """Export ``program`` with kernels where they take the operands.

    Args:
        program: Of any level.
        device: Where it is to run; on ``cpu`` kernels run under Triton's interpreter.
        sizes: Sizes that the compiler takes as a hint.

    Raises:
        LoweringError: an attention that no kernel takes, or an operator that decides by values what it computes.
        MissingExtraError: Triton is not installed.

    """
    require_triton("A program with Triton kernels")
    notes = _Notes({}, {}, {})
    exported = export_program(
        program,
        "AOTInductor",
        interpreter=lambda module: _Expansion(module, device, notes),
        device=device,
        sizes=sizes,
    )
    forms = {operator: dict(count) for operator, count in sorted(notes.forms.items())}
    return KernelProgram(exported, forms, tuple(notes.refused), notes.trials)


@dataclass(frozen=True)
class _Notes:
    forms: dict[str, Counter[str]]
    refused: dict[str, None]
    trials: dict[str, Trial]


class _Expansion(fx.Interpreter):
    """Runs a Program's graph with kernels; an operator that none takes runs as the operators of its reference."""

    def __init__(self, module: fx.GraphModule, device: str, notes: _Notes) -> None:
        super().__init__(module)
        self._device, self._notes = device, notes
        self._place = ""

    def run_node(self, n: fx.Node) -> Any:
        self._place = n.meta["custom"]["path"] or "an unnamed place"
        try:
            return super().run_node(n)
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(
                f"{n.target} at {self._place} has no graph for AOTInductor: {explain(error)} "
                f"Lower the program for ort-cpu."
            ) from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        operator = find_operator(target)
        if operator is None:
            # a model was captured on the processor
            changed = {"device": torch.device(self._device)} if kwargs.get("device") is not None else {}
            return call(target, args, {**kwargs, **changed})
        reason = self._refusal(operator, args, kwargs)
        counted = self._notes.forms.setdefault(operator.name, Counter())
        if reason is None:
            counted["kernel"] += 1
            return getattr(torch.ops.xf_triton, operator.name).default(*args, **kwargs)
        counted["aten"] += 1
        return operator.reference(*args, **kwargs)

    def _too_old(self, kernel: Kernel) -> str | None:
        if self._device != "cuda" or (found := torch.cuda.get_device_capability()) >= kernel.capability:
            return None
        needed, present = (".".join(map(str, one)) for one in (kernel.capability, found))
        return f"it needs the compute capability {needed}, and the GPU has {present}"

    def _refusal(self, operator: Operator, args: Any, kwargs: Any) -> str | None:
        """Return why the operator takes no kernel; note what its kernel has to choose."""
        kernel = load_kernels().get(operator.name)
        if kernel is None:
            return "there is none"
        reason = self._too_old(kernel) or kernel.accepts(*args, **kwargs)
        if reason is None:
            if kernel.trial is not None:
                trial = kernel.trial(*args, **kwargs)
                self._notes.trials[trial.key] = trial
            return None
        if operator.name in _MUST_BE_KERNELS:
            raise LoweringError(
                f"xf.{operator.name} at {self._place} has no Triton kernel: {reason}. Lower the program for another "
                f"target, or convert it to float32, float16 or bfloat16 with heads that a kernel takes."
            )
        self._notes.refused[f"xf.{operator.name} at {self._place} is computed by torch: {reason}"] = None
        return reason
