"""Leave full attention to a few layers, and give all others a window (MASFormer).

    softmax(scale q k^T + bias) v    ->    the same over keys with |i - j| <= w, in all layers but the most sensitive

MASFormer trains, or goes on training, with full attention in a few fixed layers.  Which layers those are is measured
here, and nothing is trained: each layer alone gets the window, and those whose window moves the answer of the program
most stay full.  The move of an answer p is KL(p || p'); see ``answers.py``.  The window follows from ``keep``: the full
layers and the windows together compute that share of the visible pairs, at the length of the longest calibration
sequence.

**Approximate**; without the paper's training, this is its starting point and not its result.

Zhang et al., MASFormer: Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer,
Findings of EMNLP 2023, arXiv 2310.12442.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import DataError, PassError
from xformopt.match import arguments, xf
from xformopt.passes.answers import answer_of
from xformopt.passes.sparsify.support.candidates import (
    bias_refusal,
    find_attentions,
    length_on,
    refusal,
    repeat_heads,
)
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, interpret, path_of
from xformopt.rewrite import Editor, Reject, Rewritten, Rule, rewrite

__all__ = ["LocalizeAttention", "widest_window"]

# what each layer is judged on: it takes a run for every layer
_BATCHES = 2


@dataclass(frozen=True)
class LocalizeAttention(Pass):
    """Leave full attention to the most sensitive layers, and give all others a window.

    Attributes:
        keep: Share of the visible pairs that is computed over all layers, at the longest calibration sequence.
        full: How many layers keep full attention; None: as many as half of that share pays for.

    """

    keep: float = 0.25
    full: int | None = None

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Zhang et al., MASFormer, arXiv 2310.12442",)

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, but is {self.keep}")
        if self.full is not None and self.full < 0:
            raise ValueError(f"full must be at least 0, but is {self.full}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Measure each layer, then give those a window that need their reach least."""
        every = set(find_attentions(program))
        nodes = {node.name: node for node in program.nodes() if node.name in every}
        able = [name for name, node in nodes.items() if _refusal(program, node) is None]
        if not able:
            return _result(program, rewrite(program, (_localizing(every, (), 0),)), ())
        if not context.calibration:
            raise DataError(
                "Which layers need full attention is measured on calibration data, and there is none. Give some with "
                "--calibration (or calibration=... in Python)."
            )
        batches = context.calibration[:_BATCHES]
        length = max(length_on(program, nodes[able[0]], batch) for batch in batches)
        full = int(self.keep * len(able) / 2) if self.full is None else self.full
        window = self._window(program, nodes[able[0]], length, full, len(able))
        ranked = _by_sensitivity(program, batches, able, window, context) if full else []
        local = [name for name in able if name not in ranked[:full]]
        done = rewrite(program, (_localizing(every, local, window),))
        kept = ", ".join(path_of(nodes[name]) or name for name in able if name not in local)
        notes = (f"window: {window} tokens to each visible side", f"full attention: {kept or 'in no layer'}")
        return _result(program, done, notes)

    def _window(self, program: Program, node: fx.Node, length: int, full: int, layers: int) -> int:
        if full >= layers:
            raise PassError(f"All {layers} attentions that could have a window are to stay full: ask for fewer.")
        share = (self.keep * layers - full) / (layers - full)
        window = widest_window(length, share, causal=arguments(node)["causal"])
        if window is None:
            raise PassError(
                f"Full attention in {full} of {layers} layers, and in all others each token's own key, is more than "
                f"{self.keep:.0%} of the attention over {length} tokens. Keep more, or fewer layers full."
            )
        return window


def widest_window(length: int, share: float, *, causal: bool) -> int | None:
    """Return the widest window that sees at most a share of the visible pairs, or None where even 0 sees more.

    A window of w holds w keys before a query, and as many after it unless causal.
    """
    visible = length * (length + 1) // 2 if causal else length * length
    found = None
    for w in range(length):
        before = w * length - w * (w + 1) // 2
        if length + (before if causal else 2 * before) > share * visible:
            break
        found = w
    return found


def _refusal(program: Program, node: fx.Node) -> str | None:
    return refusal(program, node) or bias_refusal(program, node)


def _localizing(every: Collection[str], chosen: Collection[str], window: int) -> Rule:
    def localize_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        if node.name not in every:
            return None
        reason = _refusal(editor.program, node)
        if reason is not None:
            return Reject(reason)
        if node.name not in chosen:
            return Reject("it is among the layers that need their reach most")
        given = arguments(node)
        return editor.call(
            xf.local_attention,
            given["q"],
            repeat_heads(editor, given["k"], given["kv_heads"], given["heads"]),
            repeat_heads(editor, given["v"], given["kv_heads"], given["heads"]),
            given["key_mask"],
            given["bias"],
            heads=given["heads"],
            scale=given["scale"],
            window_left=window,
            window_right=0 if given["causal"] else window,
            causal=given["causal"],
        )

    return localize_attention


def _by_sensitivity(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], able: Sequence[str], window: int, context: Context
) -> list[str]:
    """Return attentions in the order of how much a window alone in each moves the answer, most first."""
    wanted = [answer_of(program, interpret(program, batch), batch) for batch in batches]
    moved: dict[str, float] = {}
    for done, name in enumerate(able):
        context.progress("measuring layers", done, len(able))
        tried = rewrite(program, (_localizing(set(able), (name,), window),)).program
        found = [answer_of(tried, interpret(tried, batch), batch) for batch in batches]
        moved[name] = sum(float(one.divergence(other)) for one, other in zip(wanted, found, strict=True))
    return sorted(able, key=lambda name: -moved[name])


def _result(program: Program, done: Rewritten, notes: tuple[str, ...]) -> PassResult:
    changed = bool(done.fired)
    return PassResult(done.program if changed else program, changed, done.fired, done.rejected, notes)
