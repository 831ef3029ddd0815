"""Rewrites of operators with several results are compared result by result."""

from __future__ import annotations

from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.program import Program

TEXT = """program "m" target
dim batch in [1, inf]
input %x: f32[batch,8]
input %r: f32[batch,8]
%m: (f32[batch,8], f32[batch,8]) = xf.add_layer_norm(%x, %r) {eps=1e-05}
%n: (f32[batch,8], f32[batch,8]) = xf.add_layer_norm(%x, %r) {eps=1e-05}
%a: f32[batch,8] = size.getitem(%m, 0)
%b: f32[batch,8] = size.getitem(%n, 1)
return a=%a, b=%b
"""


def test_several_results() -> None:
    result = Pipeline([parse_pass("eliminate-common-subexpressions")]).run(Program.parse(TEXT))
    assert result.history[-1].fired == 1
    assert result.history[-1].relative_l2 == 0
