"""Replace softmax attention by Liger attention: a gated recurrence out of the model's own weights, and a window.

    q' = softmax_d(q),  k' = softmax_d(k),  log g = logsigmoid(k) / 16        of each head, before rotary embedding
    S_t = diag(g_t) S_{t-1} + k'_t v_t^T,   o_t = q'_t S_t                    (gated linear attention)
    out = o / 2 + softmax attention within the last 64 keys / 2               (with rotary embedding)

No weight is new and none is changed: the gates are pooled from the keys, where a full gate needs no pooling.  With
``target=delta-rule`` the recurrence is the delta rule, ``S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T``, with keys
of length one and ``beta = sigmoid(mean_d k)``, pooled to one number a head.  The hybrid with the window is the method;
``window_only`` leaves the recurrence out, which is the control that its gain has to be measured against.

Encoders, which the paper does not treat: the mean of the recurrence in both directions, and a window of both sides.
Padding adds nothing to a state and keeps it.

**Approximate**, without training; the paper recovers by LoRA on queries, keys and values: run that behind this pass.

Lan et al., Liger, ICML 2025, arXiv 2503.01496.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.match import xf
from xformopt.passes.linearize.support.linearization import Form, Linearization, Trained
from xformopt.passes.linearize.support.sites import Site, spread, unexpressed_bias, without_rotation
from xformopt.pipeline import Context, Effect
from xformopt.program import Program, value_of
from xformopt.rewrite import Editor

__all__ = ["LinearizeLiger"]

aten = torch.ops.aten
_GATE_NORMALIZER = 16
_TINY = 1e-12


@dataclass(frozen=True)
class LinearizeLiger(Linearization):
    """Replace softmax attention by a gated recurrence of the same weights and a sliding window.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        bias: What happens to an additive bias of the logits: refuse the layer, or drop the bias.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.
        target: The recurrence: gla (gated linear attention) or delta-rule.
        window: Keys that a query sees by softmax attention, its own included; of encoders on each side.
        window_only: Leave the recurrence out: the control, not the method.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    bias: Literal["refuse", "drop"] = "refuse"
    # before recovery, the recurrence's half is of another size than attention: only gross faults stop here
    max_error: float = 4.0
    target: Literal["gla", "delta-rule"] = "gla"
    window: int = 64
    window_only: bool = False

    effect: ClassVar[Effect] = "approximate"
    sources: ClassVar[tuple[str, ...]] = (
        "Lan et al., Liger: Linearizing Large Language Models to Gated Recurrent Structures, arXiv 2503.01496",
        "Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635",
        "Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484 (target=delta-rule)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, but is {self.window}")

    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Refuse a bias that is not to be dropped, and sequences within one window: they have nothing to recur to."""
        if length <= self.window:
            return f"its sequences of {length} tokens lie within one window of {self.window}"
        return unexpressed_bias(site, self.bias)

    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert both halves."""
        k, v = (spread(editor, site, x) for x in (site.k, site.v))
        reach = self.window - 1
        near = editor.call(
            xf.local_attention,
            site.q,
            k,
            v,
            site.key_mask,
            heads=site.heads,
            scale=site.scale,
            window_left=reach,
            window_right=0 if site.causal else reach,
            causal=site.causal,
        )
        if self.window_only:
            return Form(near)
        far = self._recurrence(editor, site, v)
        half = editor.call(aten.mul.Tensor, editor.call(aten.add.Tensor, near, far), 0.5)
        return Form(half)

    def _recurrence(self, editor: Editor, site: Site, v: fx.Node) -> fx.Node:
        q, k = without_rotation(site.q), spread(editor, site, without_rotation(site.k))
        queries = _softmax(editor, q, site.heads)
        if self.target == "gla":
            keys, gates = _softmax(editor, k, site.heads), _log_gates(editor, k)
        else:
            keys, gates = _unit(editor, k, site.heads), _strength(editor, k, site.heads)
        if site.key_mask is not None:
            exists = editor.call(aten._to_copy.default, site.key_mask, dtype=value_of(k).dtype)
            exists = editor.call(aten.unsqueeze.default, exists, -1)
            keys, gates = (editor.call(aten.mul.Tensor, x, exists) for x in (keys, gates))
        given = (queries, keys, v, gates)
        forward = self._scan(editor, site, given)
        if site.causal:
            return forward
        turned = [editor.call(aten.flip.default, x, [1]) for x in given]
        backward = editor.call(aten.flip.default, self._scan(editor, site, turned), [1])
        return editor.call(aten.mul.Tensor, editor.call(aten.add.Tensor, forward, backward), 0.5)

    def _scan(self, editor: Editor, site: Site, given: tuple[fx.Node, ...] | list[fx.Node]) -> fx.Node:
        operator = xf.gated_linear_attention if self.target == "gla" else xf.delta_rule
        return editor.call(operator, *given, heads=site.heads)


def _split(editor: Editor, x: fx.Node, heads: int) -> fx.Node:
    """Return ``[B, T, H * D]`` as ``[B, T, H, D]``."""
    return editor.call(aten.unflatten.int, x, 2, [heads, int(value_of(x).shape[2]) // heads])


def _join(editor: Editor, x: fx.Node) -> fx.Node:
    """Return ``[B, T, H, D]`` as ``[B, T, H * D]``."""
    return editor.call(aten.flatten.using_ints, x, 2, 3)


def _softmax(editor: Editor, x: fx.Node, heads: int) -> fx.Node:
    """Return each head's softmax over its channels."""
    return _join(editor, editor.call(aten._softmax.default, _split(editor, x, heads), -1, False))


def _log_gates(editor: Editor, k: fx.Node) -> fx.Node:
    """Return ``logsigmoid(k) / 16``, which is ``-softplus(-k) / 16``."""
    softplus = editor.call(aten.softplus.default, editor.call(aten.neg.default, k))
    return editor.call(aten.mul.Tensor, softplus, -1 / _GATE_NORMALIZER)


def _unit(editor: Editor, k: fx.Node, heads: int) -> fx.Node:
    """Return keys of length one in each head."""
    apart = _split(editor, k, heads)
    squares = editor.call(aten.sum.dim_IntList, editor.call(aten.mul.Tensor, apart, apart), [-1], True)
    length = editor.call(aten.sqrt.default, editor.call(aten.add.Tensor, squares, _TINY))
    return _join(editor, editor.call(aten.div.Tensor, apart, length))


def _strength(editor: Editor, k: fx.Node, heads: int) -> fx.Node:
    """Return how much of the old value each token replaces, ``[B, T, H]``."""
    pooled = editor.call(aten.mean.dim, _split(editor, k, heads), [-1])
    return editor.call(aten.sigmoid.default, pooled)
