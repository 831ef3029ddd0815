"""How much tokens matter, and what is left of a stream when some of them are dropped."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.passes.tokens.support.token_flow import Flow, Reducer
from xformopt.passes.tokens.support.token_stream import TokenLayer
from xformopt.passes.tokenwise import RefusalError
from xformopt.program import infer_value
from xformopt.program.text import target_name

__all__ = ["Dropping", "Judge", "attention_scores"]

aten = torch.ops.aten

# whose attention counts: that of every token, or of the tokens at the front alone
Judge: TypeAlias = Literal["all", "class"]


def attention_scores(flow: Flow, layer: TokenLayer, judge: Judge) -> fx.Node:
    """Insert what computes the attention each token gets in ``layer``, ``[B, T]``; side by side, attentions add up."""
    first = flow.stream.prefix if judge == "class" else 0
    found: list[fx.Node] = []
    for node in layer.attentions:
        given = arguments(node)
        heads = {name: given[name] for name in ("heads", "kv_heads", "scale")}
        operands = (given["q"], given["k"], given["key_mask"], given["key_log_size"])
        found.append(flow.call(xf.attention_received, *operands, **heads, first=first))
    total = found[0]
    for other in found[1:]:
        total = flow.call(aten.add.Tensor, total, other)
    return total


class Dropping(Reducer):
    """Tokens leave for good: what needs all of them is refused, and a mean is over those that are left."""

    def drop(self, flow: Flow, value: fx.Node, kept: fx.Node) -> fx.Node:
        """Insert what takes the tokens ``kept``, and with them what is known of padding."""
        if flow.stream.mask is not None:
            sizes = flow.sizes if flow.steps else flow.first_sizes(value)
            column = flow.call(xf.select_tokens, flow.call(aten.unsqueeze.default, sizes, 2), kept)
            flow.sizes = flow.call(aten.squeeze.dim, column, 2)
        flow.steps.append(kept)
        return flow.call(xf.select_tokens, value, kept)

    def read_all(self, flow: Flow, node: fx.Node, value: fx.Node, depth: int) -> None:
        """Adapt a mean to the tokens that are left, and refuse everything else."""
        if is_call(node, xf.mean_pool) and node.args[0] is value:
            node.args = (value, flow.mask() or node.args[1])
        elif not (is_call(node, aten.mean.dim) and arguments(node)["dim"] in ([1], [-2])):
            what = "the program returns" if node.op == "output" else f"{target_name(node.target)} reads"
            raise RefusalError(
                value, f"{what} a value for every token, and dropped tokens have none; merge-tokens keeps them"
            )
        if node.op != "output":
            node.meta["val"] = infer_value(flow.program, node)
