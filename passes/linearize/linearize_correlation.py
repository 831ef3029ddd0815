"""Replace softmax attention inside windows of an image by HiT-SR's spatial-channel correlation.

    q, v = linear layers of x, of half the channels;   v~ = v summed up by weights over groups of neighbours (S tokens)
    spatial, for each head of width d:  (q v~^T / d + B) v~            channel:  v (v^T q) / T
    out = mix [spatial, channel]

There are no keys and no softmax, and T tokens of a window cost what ``T S`` pairs do.  B has an entry for each token of
the window and each group, in the place of the paper's small network of their distance, and of the bias that attention
had.

It does not approximate softmax attention: the paper trains its models from nothing, with windows that grow by layer,
and computes q and v by a convolution beside the linear layer.  Here windows stay as they are, and what is computed
inside of one is computed from its own tokens.  Queries and values start as the first half of each head's, B as the
mean, ``mix`` as the identity, and all are trained, layer by layer, until the output is close to the attention's
(``fit=false``: they stay, which is the control).  Run a recovery behind this pass.  ``mix`` is a layer more before
attention's own output layer, for the one of keys and half of those of queries and values that are gone.

A window that was shifted over the edge of the image holds tokens that are no neighbours, which a mask keeps apart;
sums over all tokens cannot, and such attention stays.

Zhang et al., HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution, ECCV 2024, arXiv 2407.05878.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import is_call, xf
from xformopt.passes.linearize.support.linearization import FittedLinearization, Form, Trained
from xformopt.passes.linearize.support.sites import Site, projected_from, projection_of, seen_value, with_projection
from xformopt.pipeline import Context
from xformopt.program import Program, shape_of, value_of
from xformopt.rewrite import Editor

__all__ = ["LinearizeCorrelation"]

aten = torch.ops.aten
# a bias below this hides a pair
_HIDDEN = -1e4


@dataclass(frozen=True)
class LinearizeCorrelation(FittedLinearization):
    """Replace softmax attention inside windows by correlation over tokens and channels, fitted to it.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.
        base: Groups along each side of a window, S = base^2; a window of no more tokens than that is not grouped.
        fit: Whether the layers are trained to suit it.
        iterations: Training steps of each layer, at most.
        minutes: What all training may take; None: no limit.
        rate: Learning rate of the fit.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    max_error: float = 1.0
    base: int = 8
    fit: bool = True
    iterations: int = 200
    minutes: float | None = 5.0
    rate: float = 3e-3

    sources: ClassVar[tuple[str, ...]] = ("Zhang et al., HiT-SR, ECCV 2024, arXiv 2407.05878",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base < 1:
            raise ValueError(f"base must be at least 1, but is {self.base}")

    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Refuse what is no window of an image, and masks that sums over all tokens cannot keep."""
        batch = shape_of(program, site.q)[0]
        if isinstance(batch, int) or str(batch) in program.dims:
            return "it looks at whole sequences, and the correlation is one of windows of an image"
        if site.causal or site.key_mask is not None:
            return "some of its tokens see only part of its window, and the correlation is one of all tokens"
        if site.heads != site.kv_heads or site.depth != site.width or site.depth % 2:
            return f"its {site.heads} heads have no even width of {site.depth} that queries and values share"
        if any(projected_from(x) is None or is_call(x, xf.rope, xf.rms_norm) for x in (site.q, site.v)):
            return "its queries and values are no linear layers, of which half could be taken"
        side = math.isqrt(length)
        if side * side != length or (side > self.base and side % self.base):
            return f"its windows of {length} tokens are no squares that {self.base} x {self.base} groups divide"
        if site.bias is not None and bool((seen_value(program, site.bias, context) < _HIDDEN).any()):
            return f"its bias %{site.bias.name} hides pairs of tokens (of a shifted window), and sums take in all"
        return None

    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert the correlation behind layers of its own."""
        names: list[str] = []

        def own(what: str, start: torch.Tensor) -> fx.Node:
            names.append(f"{site.node.name}.{what}")
            return editor.parameter(names[-1], trained.get(names[-1], start))

        q, v = (_half(editor, site, role, trained, names) for role in ("q", "v"))  # [B, T, C / 2]
        T = int(value_of(site.q).shape[1])
        heads_q, heads_v = (_heads_first(editor, x, site.heads) for x in (q, v))  # [B, H, T, d]
        groups = self._groups(T)
        if groups < T:
            order = editor.parameter(f"groups_{T}_{groups}", _grouped(T, groups))
            apart = editor.call(aten.unflatten.int, _picked(editor, heads_v, order), 2, [groups, T // groups])
            shares = own("shares", torch.full((T // groups, 1), groups / T))
            heads_v = editor.call(aten.sum.dim_IntList, editor.call(aten.mul.Tensor, apart, shares), [3])
        columns = editor.call(aten.transpose.int, heads_v, 2, 3)
        products = editor.call(aten.mul.Tensor, editor.call(aten.matmul.default, heads_q, columns), 2 / site.depth)
        weights = editor.call(
            aten.add.Tensor, products, own("position", torch.full((1, site.heads, T, groups), 1 / groups))
        )
        tokens = editor.call(aten.permute.default, editor.call(aten.matmul.default, weights, heads_v), [0, 2, 1, 3])
        spatial = editor.call(aten.flatten.using_ints, tokens, 2, 3)
        rows = editor.call(aten.transpose.int, v, 1, 2)
        channels = editor.call(aten.mul.Tensor, editor.call(aten.matmul.default, rows, q), 1 / T)  # [B, C / 2, C / 2]
        both = editor.call(aten.cat.default, [spatial, editor.call(aten.matmul.default, v, channels)], 2)
        mixed = editor.call(xf.linear, both, own("mix", torch.eye(site.heads * site.width)))
        return Form(mixed, tuple(names) if self.fit else ())

    def _groups(self, T: int) -> int:
        """Return S; of a length that is only timed and cannot be divided, T."""
        count = self.base * self.base
        return count if count < T and T % count == 0 else T


def _half(editor: Editor, site: Site, role: str, trained: Trained, names: list[str]) -> fx.Node:
    """Return the first half of each head of queries or values, by a linear layer of its own."""
    x: fx.Node = getattr(site, role)
    rows = torch.arange(site.heads * site.depth).unflatten(0, (site.heads, site.depth))[:, : site.depth // 2].flatten()
    linear = projection_of(editor, x)
    if linear is None:
        return _picked(editor, x, editor.parameter(f"half_{site.heads}_{site.depth}", rows))
    start = {place: value[rows] for place, value in zip(("weight", "bias"), linear, strict=True) if value is not None}
    stored = {f"{site.node.name}.{role}.{place}": value for place, value in start.items()}
    names += stored
    return with_projection(editor, x, {name: trained.get(name, value) for name, value in stored.items()})


def _picked(editor: Editor, x: fx.Node, index: fx.Node) -> fx.Node:
    return editor.call(aten.index_select.default, x, 2, index)


def _heads_first(editor: Editor, x: fx.Node, heads: int) -> fx.Node:
    """Turn ``[B, T, H * d]`` into ``[B, H, T, d]``."""
    apart = editor.call(aten.unflatten.int, x, 2, [heads, int(value_of(x).shape[2]) // heads])
    return editor.call(aten.permute.default, apart, [0, 2, 1, 3])


def _grouped(T: int, groups: int) -> torch.Tensor:
    """Return the tokens of a window ``[T]``, those of each square group together; in order where it is no square."""
    side, base = math.isqrt(T), math.isqrt(groups)
    if side * side != T or side % base:
        return torch.arange(T)
    each = side // base
    return torch.arange(T).view(base, each, base, each).permute(0, 2, 1, 3).flatten()
