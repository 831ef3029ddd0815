"""Compute queries, keys and values, or what else reads one value, by a single wide linear layer.

    q, k, v = x Wq^T + bq, x Wk^T + bk, x Wv^T + bv    ->    q, k, v = split(x [Wq; Wk; Wv]^T + [bq; bk; bv])

**Exact**: every output is the same sum of products.  Run it after lifting; before or after ``fold-norm-affine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from xformopt.match import arguments, is_call, operand, readers, xf
from xformopt.passes.weights import WideLinears, is_linear
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FuseQkv"]


# what may stand between a projection and its attention: each acts on every head by itself
_BETWEEN = (xf.rope, xf.rms_norm, xf.layer_norm)
_ROLES = ("q", "k", "v")


@dataclass(frozen=True)
class FuseQkv(RewritePass):
    """Make one linear layer of the projections of an attention that read the same value.

    Attributes:
        siblings: attention: the projections of one attention; all: any linear layers that read the same value.

    """

    siblings: Literal["attention", "all"] = "attention"

    sources: ClassVar[tuple[str, ...]] = ("Vaswani et al., arXiv 1706.03762",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the first of the linear layers."""
        wide = WideLinears()

        def fuse_qkv(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
            if not is_linear(node):
                return None
            group = _projections(node) if self.siblings == "attention" else _siblings(node)
            if len(group) < 2 or node is not min(group):
                return _explain_loner(node, group)
            label = "".join(role for role in _ROLES if role in group.values()) or "wide"
            return wide.fuse(editor, list(group), label)

        return (fuse_qkv,)


def _siblings(node: fx.Node) -> dict[fx.Node, str]:
    """Return the linear layers that read what ``node`` reads, in execution order."""
    source = operand(node)
    return {reader: "" for reader in readers(source) if is_linear(reader) and operand(reader) is source}


def _projections(node: fx.Node) -> dict[fx.Node, str]:
    """Return the projections of the attention that ``node`` feeds and that read the same value, by role."""
    for attention, _ in _attentions(node):
        found: dict[fx.Node, str] = {}
        for role in _ROLES:
            linear = _projection_of(arguments(attention)[role])
            if linear is not None and operand(linear) is operand(node):
                found.setdefault(linear, role)
        return found
    return {}


def _attentions(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Yield the attentions that ``node`` reaches, with the role it has there."""
    for reader in readers(node):
        if is_call(reader, xf.attention):
            yield from ((reader, role) for role in _ROLES if arguments(reader)[role] is node)
        elif _stands_between(reader) and operand(reader) is node:
            yield from _attentions(reader)


def _projection_of(value: object) -> fx.Node | None:
    while isinstance(value, fx.Node) and _stands_between(value):
        value = operand(value)
    return value if isinstance(value, fx.Node) and is_linear(value) else None


def _stands_between(node: fx.Node) -> bool:
    return is_call(node, *_BETWEEN)


def _explain_loner(node: fx.Node, group: Mapping[fx.Node, str]) -> Reject | None:
    """Say why a projection is alone; the later ones of a group, and what is no projection, are no candidates."""
    if len(group) == 1:
        return Reject(f"no other projection of its attention reads %{operand(node).name}")
    return None
