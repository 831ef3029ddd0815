"""Round weights and activations to 16 bits, bfloat16 or float16, or bring them all to float32.

    y = f(x; W)    ->    y = f(r(x); r(W)),    r rounds to the nearest value of the type

Inputs and outputs keep their types.  What positions are made of keeps its precision, as torch's autocast and model code
do: what counts, and whatever sines and cosines are computed from, up to the layer that made it, since an angle or a
time step of 1,000 has no decimals left in bfloat16.  So do recurrences, whose decays of 0.999 would become 1, and
quantized operators, whose codes and scales are as they are.  Numbers that float16 cannot hold become its largest: the
-3e38 of a mask stays a finite number.

**Approximate** where it narrows.  A target that computes in 16 bits gains time and bytes; one that does not, as
processors without such arithmetic, gains the bytes: it stores weights in 16 bits and computes in float32, and says so.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.kernels.definition import find_operator
from xformopt.match import is_call
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, convert_precision, path_of
from xformopt.rewrite import Rejected

__all__ = ["ConvertPrecision"]

aten = torch.ops.aten
_TYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WAVES = (aten.sin.default, aten.cos.default)
_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
# layers that are no operators of the dialect
_LAYERS = (aten.embedding.default, aten.convolution.default)


@dataclass(frozen=True)
class ConvertPrecision(Pass):
    """Compute in another floating-point type.

    Attributes:
        to: The type that replaces all others.
        skip: Shell patterns of module paths that compute as before.

    """

    to: Literal["fp32", "fp16", "bf16"] = "bf16"
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    # on a target that stores 16 bits and computes in 32, bytes are what it is for
    aims_at_time: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = (
        "Micikevicius et al., Mixed Precision Training, arXiv 1710.03740",
        "Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, arXiv 1905.12322",
    )

    def run(self, program: Program, context: Context) -> PassResult:
        """Convert all that may be."""
        to = _TYPES[self.to]
        kept = _behind_waves(program)
        kept |= {node: "it counts" for node in program.nodes() if is_call(node, *_COUNTS)}
        kept |= {node: "it multiplies decays" for node in program.nodes() if _needs_float32(node)}
        kept |= {node: "it is quantized" for node in program.nodes() if _is_quantized(program, node)}
        kept |= {node: "skip names it" for node in program.nodes() if self._is_skipped(node)}
        rejected = tuple(Rejected(self.name, path_of(node), node.name, why) for node, why in kept.items())
        others = set(_TYPES.values()) - {to}
        done = convert_precision(program, others, to, keep=kept.__contains__)
        if str(done) == str(program):
            return PassResult(program, False, rejected=rejected)
        computed = sum(_computes_in(node, {to}) for node in done.nodes())
        note = f"{computed} of {len(list(done.nodes()))} operators compute in {self.to}"
        return PassResult(done, True, rejected=rejected, notes=(note,))

    def _is_skipped(self, node: fx.Node) -> bool:
        return any(fnmatchcase(path_of(node), pattern) for pattern in self.skip)


def _behind_waves(program: Program) -> dict[fx.Node, str]:
    """Return sines and cosines and what they are computed from, up to the layers that made it."""
    found: dict[fx.Node, str] = {}
    waiting = [node for node in program.nodes() if is_call(node, *_WAVES)]
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function" or _is_layer(node):
            continue
        if _computes_in(node, set(_TYPES.values())):
            found[node] = "sines or cosines are computed from it"
        waiting += node.all_input_nodes
    return found


def _computes_in(node: fx.Node, types: Set[torch.dtype]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in types


def _is_layer(node: fx.Node) -> bool:
    return find_operator(node.target) is not None or is_call(node, *_LAYERS)


def _needs_float32(node: fx.Node) -> bool:
    operator = find_operator(node.target)
    return operator is not None and operator.needs_float32


def _is_quantized(program: Program, node: fx.Node) -> bool:
    """Whether a node is an xf operator that reads codes."""
    return find_operator(node.target) is not None and any(
        source.op == "get_attr" and not program.parameters[str(source.target)].is_floating_point()
        for source in node.all_input_nodes
    )
