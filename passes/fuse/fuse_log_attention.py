"""Join both halves of attention and the logarithmic rounding of weights between them.

    weights = softmax(q k^T),  rounded = 2^(-c q / r),  y = rounded v    ->    y = log_attention(q, k, v)

**Exact**: it is one operator where there were three.  TVM's kernel of it adds values up by the code of their weight,
and shifts the sums; elsewhere the three steps stay as they were.  Run it behind ``adalog`` or ``repquant``.

Wu et al., AdaLog, ECCV 2024, arXiv 2407.12951.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.match import arguments, is_call, is_returned, xf
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FuseLogAttention"]

# with as many codes as a sequence has keys nothing is added up
_MOST_BITS = 6
_LEVELS = ("bits", "numerator", "denominator", "round_table", "flush")


@dataclass(frozen=True)
class FuseLogAttention(RewritePass):
    """Make one operator of attention whose weights are rounded to powers of a base."""

    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = ("Wu et al., AdaLog, ECCV 2024, arXiv 2407.12951",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires where the values are summed."""
        return (_fuse_log_attention,)


def _fuse_log_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not is_call(node, xf.attention_values):
        return None
    rounded = arguments(node)["weights"]
    if not is_call(rounded, xf.log_quantize):
        return Reject("its weights are not rounded to powers of a base")
    levels = arguments(rounded)
    weights = levels["x"]
    if not is_call(weights, xf.attention_weights):
        return Reject("what is rounded is no softmax of attention")
    for value in (rounded, weights):
        if is_returned(value):
            return Reject(f"%{value.name} is also returned")
        if len(value.users) > 1:
            return Reject(f"%{value.name} has {len(value.users) - 1} other readers")
    if levels["bits"] > _MOST_BITS:
        return Reject(f"its codes have {levels['bits']} bits, and more than {_MOST_BITS} are no few")
    given = arguments(weights)
    operands = [given.pop(name) for name in ("q", "k", "key_mask", "bias", "key_log_size")]
    attributes = {**given, **{name: levels[name] for name in _LEVELS}}
    q, k, *masks = operands
    return editor.call(xf.log_attention, q, k, arguments(node)["v"], levels["scale"], *masks, **attributes)
