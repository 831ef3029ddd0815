"""Programs to prune, and the same removal done the other way: by zeros in the weights that read a unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from xformopt.analysis.coupling import Group
from xformopt.match import operand
from xformopt.program import Program

__all__ = ["ENCODER", "masked_weights"]

ENCODER = """
program "encoder" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %ids: i64[batch,length] below 80
input %mask: i64[batch,length]
param %table: f32[80,32]
param %norm.w: f32[32]
param %norm.b: f32[32]
param %q.w: f32[32,32]
param %q.b: f32[32]
param %k.w: f32[16,32]
param %v.w: f32[16,32]
param %v.b: f32[16]
param %o.w: f32[32,32]
param %norm2.w: f32[32]
param %up.w: f32[48,32]
param %up.b: f32[48]
param %down.w: f32[32,48]
param %down.b: f32[32]
param %norm3.w: f32[32]
param %gate.w: f32[48,32]
param %value.w: f32[48,32]
param %out.w: f32[32,48]
param %head.w: f32[5,32]
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%x: f32[batch,length,32] = aten.embedding(%table, %ids)
%n: f32[batch,length,32] = xf.layer_norm(%x, %norm.w, %norm.b) {eps=1e-05}  # layer.norm
%q: f32[batch,length,32] = xf.linear(%n, %q.w, %q.b)  # layer.attention.query
%k: f32[batch,length,16] = xf.linear(%n, %k.w)  # layer.attention.key
%v: f32[batch,length,16] = xf.linear(%n, %v.w, %v.b)  # layer.attention.value
%a: f32[batch,length,32] = xf.attention(%q, %k, %v, %keep) {heads=8, kv_heads=4, scale=0.5}  # layer.attention
%o: f32[batch,length,32] = xf.linear(%a, %o.w)  # layer.attention.output
%s: f32[batch,length,32] = aten.add.Tensor(%x, %o)  # layer
%m: f32[batch,length,32] = xf.rms_norm(%s, %norm2.w) {eps=1e-05}  # layer.norm2
%u: f32[batch,length,48] = xf.linear(%m, %up.w, %up.b)  # layer.up
%g: f32[batch,length,48] = xf.activation(%u) {function=gelu}  # layer.act
%d: f32[batch,length,32] = xf.linear(%g, %down.w, %down.b)  # layer.down
%t: f32[batch,length,32] = aten.add.Tensor(%s, %d)  # layer
%m2: f32[batch,length,32] = xf.rms_norm(%t, %norm3.w) {eps=1e-05}  # gated.norm
%gate: f32[batch,length,48] = xf.linear(%m2, %gate.w)  # gated.gate
%value: f32[batch,length,48] = xf.linear(%m2, %value.w)  # gated.value
%glu: f32[batch,length,48] = xf.glu(%gate, %value) {function=silu}  # gated
%out: f32[batch,length,32] = xf.linear(%glu, %out.w)  # gated.out
%r: f32[batch,length,32] = aten.add.Tensor(%t, %out)  # gated
%pooled: f32[batch,32] = xf.mean_pool(%r, %mask) {eps=1e-09}  # pool
%logits: f32[batch,5] = xf.linear(%pooled, %head.w)  # head
return logits=%logits, hidden=%r valid keep %mask
"""


def masked_weights(program: Program, kept: Mapping[Group, torch.Tensor]) -> Program:
    """Return ``program`` as it is, with zeros in the columns that read what is not kept."""
    masked = program.copy()
    named = {node.name: node for node in program.graph.nodes}
    for group, stays in kept.items():
        for consumer in group.consumers:
            name = str(operand(named[consumer], 1).target)
            columns = stays[group.parameters[name, 1]]
            masked.parameters[name] = masked.parameters[name] * columns
    return masked
