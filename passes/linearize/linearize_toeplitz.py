"""Replace softmax attention with relative position biases by kernelized attention with the same biases.

    softmax(s q k^T + b_{j-i}) v    ->    sum_j c_{j-i} (phi(q_i) . phi(k_j)) v_j / sum_j c_{j-i} (phi(q_i) . phi(k_j))

with ``c = exp(b)``, q and k of length one, and positive random features ``phi(x) = exp(W x - |x|^2 / 2) / sqrt(m)``.
Only for an additive bias that depends on ``j - i`` alone, which is looked for in its values (T5, ALiBi).  As the length
of queries and keys is lost, the linear layers behind queries, keys and values are trained, layer by layer, until the
output is close to the attention's.

By FFT the form is ``O(m E T log T)`` a head.  On a CPU that is slower than the products up to beyond 8,000 tokens, and
the kernel takes the products over all pairs: no time is saved, which the crossover shows.  Where the bias is looked up
for all pairs it still is, and its first and last row are what the form reads.

Luo et al., Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, NeurIPS 2021, arXiv
2106.12566; Choromanski et al., Performer, ICLR 2021, arXiv 2009.14794 (the features).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import xf
from xformopt.passes.linearize.support.linearization import FittedLinearization, Form, Trained
from xformopt.passes.linearize.support.sites import Site, relearned, seen_value, spread
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Editor

__all__ = ["LinearizeToeplitz"]

aten = torch.ops.aten
_DRAW = 0
# stands for minus infinity
_UNSEEN = -1e30


@dataclass(frozen=True)
class LinearizeToeplitz(FittedLinearization):
    """Replace softmax attention with relative position biases by kernelized attention with the same biases.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.
        features: Random features of a head.
        iterations: Training steps of each layer, at most.
        minutes: What all training may take; None: no limit.
        rate: Learning rate of the fit.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    max_error: float = 1.0
    features: int = 32
    iterations: int = 200
    minutes: float | None = 5.0
    rate: float = 3e-3

    sources: ClassVar[tuple[str, ...]] = (
        "Luo et al., Kernelized Attention with Relative Positional Encoding, NeurIPS 2021, arXiv 2106.12566",
        "Choromanski et al., Performer, ICLR 2021, arXiv 2009.14794 (positive random features)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"features must be at least 1, but is {self.features}")

    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Refuse what has no bias, or one that depends on more than the distance."""
        if site.bias is None:
            return "it has no additive bias of the logits, which is what this form is for"
        if site.bias.meta["val"].dim() != 4:
            return f"its bias %{site.bias.name} is not [1, heads, T, T]"
        value = seen_value(program, site.bias, context)
        if value.shape[0] != 1 or value.shape[2] != value.shape[3] or value.shape[1] not in (1, site.heads):
            return f"its bias %{site.bias.name}, {list(value.shape)}, is not [1, heads, T, T]"
        if not torch.equal(value[..., 1:, 1:], value[..., :-1, :-1]):
            return f"its bias %{site.bias.name} depends on more than the distance of query and key"
        return None

    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert the form behind projections of its own."""
        own, names = relearned(editor, site, trained)
        generator = torch.Generator().manual_seed(_DRAW)
        drawn = torch.randn(site.heads, site.depth, self.features, generator=generator)
        name = f"{site.node.name}.random_features"
        features = editor.parameter(name, trained.get(name, drawn))
        k, v = (spread(editor, site, x) for x in (own.k, own.v))
        node = editor.call(
            xf.toeplitz_attention,
            own.q,
            k,
            v,
            _by_distance(editor, site),
            site.key_mask,
            features,
            heads=site.heads,
            causal=site.causal,
        )
        return Form(node, tuple(names))


def _by_distance(editor: Editor, site: Site) -> fx.Node:
    """Return the bias of each distance ``j - i`` from ``-T`` to ``T``, ``[heads or 1, 2 T + 1]``.

    The last query sees the distances up to 0, the first one those from 0 on.  No pair is T apart: an entry at both ends
    only keeps every size at T or above, as sizes of ``T - 1`` would rule out short sequences in a trace.
    """
    rows = editor.call(aten.select.int, site.bias, 0, 0)
    last, first = (editor.call(aten.select.int, rows, 1, place) for place in (-1, 0))
    earlier = editor.call(aten.constant_pad_nd.default, last, [1, 0], _UNSEEN)
    padded = editor.call(aten.constant_pad_nd.default, first, [0, 1], _UNSEEN)
    later = editor.call(aten.slice.Tensor, padded, 1, 1, sys.maxsize)
    return editor.call(aten.cat.default, [earlier, later], 1)
