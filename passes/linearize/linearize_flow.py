"""Replace softmax attention by Flowformer's, which conserves the flow from values to results.

    I_i = q_i . sum_j k_j,   O_j = k_j . sum_i q_i,   I'_i = q_i . sum_j k_j / O_j,   O'_j = k_j . sum_i q_i / I_i
    out = sigmoid(I' T / S) (q / I) (k^T (softmax_j(O') S v)),     q and k through a sigmoid; causal: prefix sums

It does not approximate softmax attention, and swapped into a trained model it gives something else.  So the layer gets
queries, keys and values of its own: the linear layers behind them are trained, layer by layer, until its output is
close to the attention's (``fit=false``: they stay, which is the control).  The paper trains whole models: run a
recovery behind this pass.

Wu et al., Flowformer, ICML 2022, arXiv 2202.06258.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from xformopt.match import xf
from xformopt.passes.linearize.support.linearization import FittedLinearization, Form, Trained
from xformopt.passes.linearize.support.sites import Site, relearned, spread, unexpressed_bias
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Editor

__all__ = ["LinearizeFlow"]


@dataclass(frozen=True)
class LinearizeFlow(FittedLinearization):
    """Replace softmax attention by flow attention, with projections fitted to it.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        bias: What happens to an additive bias of the logits: refuse the layer, or drop the bias.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.
        fit: Whether the linear layers of queries, keys and values are trained to suit it.
        iterations: Training steps of each layer, at most.
        minutes: What all training may take; None: no limit.
        rate: Learning rate of the fit.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    bias: Literal["refuse", "drop"] = "refuse"
    max_error: float = 1.0
    fit: bool = True
    iterations: int = 200
    minutes: float | None = 5.0
    rate: float = 3e-3

    sources: ClassVar[tuple[str, ...]] = ("Wu et al., Flowformer, ICML 2022, arXiv 2202.06258",)

    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Refuse a bias that is not to be dropped."""
        return unexpressed_bias(site, self.bias)

    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert flow attention behind projections of its own."""
        names: list[str] = []
        if self.fit:
            site, names = relearned(editor, site, trained)
        k, v = (spread(editor, site, x) for x in (site.k, site.v))
        mask = site.key_mask
        node = editor.call(xf.flow_attention, site.q, k, v, mask, mask, heads=site.heads, causal=site.causal)
        return Form(node, tuple(names))
