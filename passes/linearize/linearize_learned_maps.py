"""Replace softmax attention by linear attention with feature maps that are learned to imitate it.

    softmax(s q k^T) v    ->    phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)),    phi(x) = [softmax(x W), softmax(-x W)]

One W for each head, started at ``sqrt(s) I``, so that the exponents of phi(q) and phi(k) add up to those of softmax
attention channel by channel; trained layer by layer, everything else frozen, to give the attention's output.  Rotary
embeddings stay in queries and keys.

With ``window``, keys less than that far away keep their exponential weights, and one sum divides both kinds (LoLCATs'
hybrid), with a learned gamma of each head between them:

    sum_near gamma exp(s q k_j) v_j + phi(q) sum_far phi(k_j)^T v_j
    ---------------------------------------------------------------
    sum_near gamma exp(s q k_j)     + phi(q) . sum_far phi(k_j)

The published methods train afterwards, by LoRA on the model's own loss: run a recovery behind this pass.

Zhang et al., The Hedgehog & the Porcupine, ICLR 2024, arXiv 2402.04347 (the map; there a map for queries and one for
keys, here one for both); Zhang et al., LoLCATs, ICLR 2025, arXiv 2410.10254 (attention transfer by output error, and
the window).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from xformopt.match import xf
from xformopt.passes.linearize.support.linearization import FittedLinearization, Form, Trained
from xformopt.passes.linearize.support.sites import Site, spread, unexpressed_bias
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Editor

__all__ = ["LinearizeLearnedMaps"]


@dataclass(frozen=True)
class LinearizeLearnedMaps(FittedLinearization):
    """Replace softmax attention by linear attention with learned feature maps.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        bias: What happens to an additive bias of the logits: refuse the layer, or drop the bias.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.
        iterations: Training steps of each layer, at most.
        minutes: What all training may take; None: no limit.
        rate: Learning rate of the maps.
        window: Keys that a query keeps by softmax, its own included; of encoders on each side.  0: none.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    bias: Literal["refuse", "drop"] = "refuse"
    max_error: float = 0.5
    iterations: int = 200
    minutes: float | None = 5.0
    rate: float = 1e-2
    window: int = 0

    sources: ClassVar[tuple[str, ...]] = (
        "Zhang et al., The Hedgehog & the Porcupine, ICLR 2024, arXiv 2402.04347",
        "Zhang et al., LoLCATs, ICLR 2025, arXiv 2410.10254, sections 3.2 and 3.3",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window must be at least 1, or 0 for none, but is {self.window}")

    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Refuse a bias that is not to be dropped, and sequences within one window: nothing in them is linear."""
        if self.window and length <= self.window:
            return f"its sequences of {length} tokens lie within one window of {self.window}"
        return unexpressed_bias(site, self.bias)

    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert linear attention with the maps, and with the window where there is one."""
        name = f"{site.node.name}.feature_map"
        start = math.sqrt(abs(site.scale)) * torch.eye(site.depth).repeat(site.heads, 1, 1)
        maps = editor.parameter(name, trained.get(name, start))
        k, v = (spread(editor, site, x) for x in (site.k, site.v))
        if self.window:
            name = f"{site.node.name}.gain"
            # both kinds of weights agree where the logits are zero, as phi(0) . phi(0) is 2 / depth
            even = torch.full((site.heads,), math.log(2 / site.depth))
            gain = editor.parameter(name, trained.get(name, even))
            node = editor.call(
                xf.windowed_linear_attention,
                site.q,
                k,
                v,
                gain,
                site.key_mask,
                maps,
                heads=site.heads,
                scale=site.scale,
                window=self.window,
                feature="hedgehog",
                causal=site.causal,
            )
            return Form(node, (str(maps.target), str(gain.target)), swift=(str(gain.target),))
        node = editor.call(
            xf.linear_attention,
            site.q,
            k,
            v,
            site.key_mask,
            maps,
            heads=site.heads,
            feature="hedgehog",
            causal=site.causal,
        )
        return Form(node, (str(maps.target),))
