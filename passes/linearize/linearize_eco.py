"""Replace softmax attention by products of learned binary codes of a projection that queries and keys share.

    x = normalise(shared projection),   H(x) = sign(A kappa(x)) of b bits
    out_i = sum_j (H_i . H_j + b) v_j / sum_j (H_i . H_j + b)        weights are not negative: linear in j

Three steps, each layer by itself on calibration data:

1. Queries and keys get one projection, started at the mean of both, which is trained together with that of the values
   and a temperature for each head, so that softmax attention with it gives what the layer gives (the distillation that
   a model with separate projections needs first).
2. The hash functions are learned on a sample of its vectors (:mod:`xformopt.passes.linearize.support.hashing`).
3. The projection of the values is trained again, behind the codes.

The codes stay as they are in later training, as the sign has no gradient; the paper learns them anew while it
fine-tunes, which is a pass of its own here, ``rehash-attention``, that recovery takes turns with.

Codes are bits in the program, and attention over them is ``xf.hamming_attention``: sums of values that bits choose.
TVM's kernel does that without a multiplication.  ONNX has no such operator; there codes become numbers of -1 and 1, and
what is saved is the square of the length.  To hash a vector takes products and exponentials on every target.

ShiftAddViT (You et al., NeurIPS 2023, arXiv 2306.06446) uses the same codes in its attention; its shift layers are
``quantize-shift``.

Liu et al., EcoFormer, NeurIPS 2022, arXiv 2209.09004.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx
from torch.nn import functional

from xformopt.match import xf
from xformopt.passes.linearize.support.hashing import fit_hashing
from xformopt.passes.linearize.support.linearization import FittedLinearization, Form, Pairs, Trained
from xformopt.passes.linearize.support.sites import (
    Site,
    projected_from,
    projection_of,
    relearned,
    spread,
    unexpressed_bias,
    with_projection,
)
from xformopt.pipeline import Context
from xformopt.program import Program, value_of
from xformopt.reconstruction import Settings
from xformopt.rewrite import Editor

__all__ = ["LinearizeEco"]

aten = torch.ops.aten
_SAMPLE = 256
_TABLES = ("anchors", "offset", "mixing", "thresholds")
_TINY = 1e-12


@dataclass(frozen=True)
class LinearizeEco(FittedLinearization):
    """Replace softmax attention by linear attention of learned binary codes.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        bias: What happens to an additive bias of the logits: refuse the layer, or drop the bias.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.
        bits: Of a code.
        anchors: Vectors that a code compares with.
        neighbours: Most and least similar vectors that codes are learned from.
        iterations: Training steps of each layer in each of both trainings, at most.
        minutes: What all training may take; None: no limit.
        rate: Learning rate of the fit.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    bias: Literal["refuse", "drop"] = "refuse"
    max_error: float = 1.0
    bits: int = 16
    anchors: int = 25
    neighbours: int = 10
    iterations: int = 200
    minutes: float | None = 5.0
    rate: float = 3e-3

    sources: ClassVar[tuple[str, ...]] = (
        "Liu et al., EcoFormer, NeurIPS 2022, arXiv 2209.09004",
        "Liu et al., Supervised Hashing with Kernels, CVPR 2012",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "anchors", "neighbours"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")

    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Refuse what has no projection to share, and codes or samples larger than the sequence."""
        if self.bits > length:
            return f"codes of {self.bits} bits cost more than its sequences of {length} tokens"
        if self.anchors > length or 2 * self.neighbours > length:
            return f"its sequences of {length} tokens are fewer than anchors={self.anchors} or 2 x {self.neighbours}"
        if site.heads != site.kv_heads:
            return f"its {site.kv_heads} key heads serve {site.heads} query heads, which cannot share a projection"
        source = projected_from(site.q)
        if source is None or source is not projected_from(site.k):
            return "its queries and keys are no linear layers of one value, so that they cannot share one"
        return unexpressed_bias(site, self.bias)

    def untrained(self, site: Site) -> Trained:
        """Return tables of zeros."""
        heads, bits = site.heads, self.bits
        shapes = ((site.depth, self.anchors), (1, 1), (self.anchors, bits), (1, bits))
        return {_name(site, table): torch.zeros(heads, *s) for table, s in zip(_TABLES, shapes, strict=True)}

    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert attention of codes where they are known, and softmax attention of a shared projection before."""
        shared, names = self._shared(editor, site, trained)
        own, values = relearned(editor, site, trained, ("v",))
        x = _unit(editor, shared, site.heads)  # [B, T, H, D]
        if _name(site, _TABLES[0]) in trained:
            return Form(self._hashed(editor, own, x, trained), tuple(values))
        name = _name(site, "temperature")
        start = torch.full((site.heads, 1), math.sqrt(site.depth))
        warm = editor.call(aten.mul.Tensor, x, editor.parameter(name, start))
        flat = [editor.call(aten.flatten.using_ints, part, 2, 3) for part in (warm, x)]
        node = editor.call(
            xf.attention,
            *flat,
            own.v,
            site.key_mask,
            heads=site.heads,
            kv_heads=site.heads,
            scale=1.0,
            causal=site.causal,
        )
        return Form(node, (*names, *values, name), watched=shared)

    def train(self, pairs: Pairs) -> tuple[Trained, list[str]]:
        """Distil the shared projections, learn the codes, and fit the values behind them."""
        minutes = None if self.minutes is None else self.minutes / 2
        settings = Settings(iterations=self.iterations, minutes=minutes, seed=pairs.context.seed)
        trained, told = pairs.fit(settings, self.rate)
        distilled = replace(pairs, trained=trained)
        shared = distilled.errors()
        tables = self._learn(distilled)
        trained, again = replace(pairs, trained={**trained, **tables}).fit(settings, self.rate)
        worst = max(shared.values())
        return trained, [*told, f"with a shared projection the largest error is {worst:.3f}", *again]

    def _shared(self, editor: Editor, site: Site, trained: Trained) -> tuple[fx.Node, list[str]]:
        """Return the shared projection ``[B, T, H * D]`` and the names of its parameters."""
        one, other = projection_of(editor, site.q), projection_of(editor, site.k)
        if one is None or other is None:
            return site.q, []
        start = {"shared.weight": (one[0] + other[0]) / 2}
        if one[1] is not None and other[1] is not None:
            start["shared.bias"] = (one[1] + other[1]) / 2
        named = {_name(site, place): value for place, value in start.items()}
        stored = {name: trained.get(name, value) for name, value in named.items()}
        return with_projection(editor, site.q, stored), list(stored)

    def _hashed(self, editor: Editor, site: Site, x: fx.Node, trained: Trained) -> fx.Node:
        """Insert attention of codes, eight bits to a byte."""
        names = (_name(site, table) for table in _TABLES)
        anchors, offset, mixing, thresholds = (editor.parameter(name, trained[name]) for name in names)
        heads_first = editor.call(aten.permute.default, x, [0, 2, 1, 3])  # [B, H, T, D]
        products = editor.call(aten.matmul.default, heads_first, anchors)
        kernel = editor.call(aten.exp.default, editor.call(aten.add.Tensor, products, offset))
        projected = editor.call(aten.matmul.default, kernel, mixing)
        is_one = editor.call(aten.ge.Tensor, projected, thresholds)
        tokens_first = editor.call(aten.permute.default, editor.call(xf.pack_bits, is_one), [0, 2, 1, 3])
        codes = editor.call(aten.flatten.using_ints, tokens_first, 2, 3)  # [B, T, H * ceil(b / 8)]
        v = spread(editor, site, site.v)
        return editor.call(
            xf.hamming_attention,
            codes,
            codes,
            v,
            site.key_mask,
            heads=site.heads,
            bits=self.bits,
            causal=site.causal,
        )

    def _learn(self, pairs: Pairs) -> Trained:
        """Learn the codes of every site on a sample of its shared vectors."""
        samples = pairs.samples(_SAMPLE)
        tables: Trained = {}
        for site in pairs.sites:
            vectors = functional.normalize(samples[site.node.name].unflatten(-1, (site.heads, -1)), dim=-1)
            found = fit_hashing(
                vectors.transpose(0, 1),
                bits=self.bits,
                anchors=self.anchors,
                neighbours=self.neighbours,
                seed=pairs.context.seed,
            )
            tables |= {_name(site, table): getattr(found, table) for table in _TABLES}
        return tables


def _name(site: Site, what: str) -> str:
    return f"{site.node.name}.{what}"


def _unit(editor: Editor, x: fx.Node, heads: int) -> fx.Node:
    """Return ``[B, T, H * D]`` as ``[B, T, H, D]`` of length one."""
    apart = editor.call(aten.unflatten.int, x, 2, [heads, int(value_of(x).shape[2]) // heads])
    squares = editor.call(aten.sum.dim_IntList, editor.call(aten.mul.Tensor, apart, apart), [-1], True)
    length = editor.call(aten.sqrt.default, editor.call(aten.add.Tensor, squares, _TINY))
    return editor.call(aten.div.Tensor, apart, length)
