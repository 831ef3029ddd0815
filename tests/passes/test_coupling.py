"""Coupled channels: what is found in graphs of several families, and that removing them is masking them."""

from __future__ import annotations

import pytest
import torch
from pruned import ENCODER, masked_weights

from xformopt.analysis import cost
from xformopt.analysis.coupling import Group, find_groups
from xformopt.capture.exporter import capture_module
from xformopt.match import arguments, is_call, xf
from xformopt.models.llama import Llama, LlamaConfig
from xformopt.models.pvt import ARCHITECTURES as PVT
from xformopt.passes.prune.support.removal import remove_units
from xformopt.pipeline import Pipeline
from xformopt.program import Program
from xformopt.verify import check

TOLERANCE = 1e-6


def lifted(model: torch.nn.Module) -> Program:
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Pipeline([]).run(capture_module(model, model.example_inputs())).program  # type: ignore[operator]


def some(group: Group) -> torch.Tensor:
    """Keep about half of the units: the first in any case, the last in none."""
    kept = torch.rand(group.units) < 0.5
    kept[0], kept[-1] = True, False
    return kept


def check_against_masks(program: Program, inputs: dict[str, torch.Tensor], kinds: tuple[str, ...]) -> Program:
    groups = [g for g in find_groups(program) if g.kind in kinds and g.pinned is None and g.units > 1]
    assert {group.kind for group in groups} == set(kinds)
    kept = {group: some(group) for group in groups}
    pruned = remove_units(program, kept)
    check(pruned, deep=True)
    assert cost(pruned).flops < cost(program).flops
    wanted = masked_weights(program, kept).run(inputs)
    for name, value in pruned.run(inputs).items():
        assert (value - wanted[name]).norm() <= TOLERANCE * wanted[name].norm()
    return pruned


def text_inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"ids": torch.randint(0, 80, (3, 9)), "mask": mask}


def test_groups_of_an_encoder() -> None:
    groups = find_groups(Program.parse(ENCODER))
    found = {(group.kind, group.units, group.path): group for group in groups if group.pinned is None}
    assert set(found) == {
        ("heads", 4, "layer.attention.output"),
        ("hidden", 48, "layer.down"),
        ("hidden", 48, "gated.out"),
    }
    heads = found["heads", 4, "layer.attention.output"]
    # a unit is a key/value head with the two query heads that it serves
    assert heads.parameters["q.w", 0].tolist() == [unit for unit in range(4) for _ in range(8)]
    assert heads.parameters["k.w", 0].tolist() == [unit for unit in range(4) for _ in range(4)]
    assert set(heads.parameters) == {("q.w", 0), ("q.b", 0), ("k.w", 0), ("v.w", 0), ("v.b", 0), ("o.w", 1)}
    gated = found["hidden", 48, "gated.out"]
    assert set(gated.parameters) == {("gate.w", 0), ("value.w", 0), ("out.w", 1)}


def test_what_is_returned_stays() -> None:
    (width,) = find_groups(Program.parse(ENCODER), "width")
    assert width.pinned is not None
    assert "an axis of the output hidden" in width.pinned


def test_removing_units_is_masking_them() -> None:
    pruned = check_against_masks(Program.parse(ENCODER), text_inputs(), ("heads", "hidden"))
    attention = next(node for node in pruned.nodes() if is_call(node, xf.attention))
    given = arguments(attention)
    assert given["heads"] == 2 * given["kv_heads"] < 8


def test_removing_units_of_grouped_queries_with_rotary_positions() -> None:
    config = LlamaConfig(vocabulary=40, width=32, depth=1, heads=4, kv_heads=2, hidden=24)
    program = lifted(Llama(config))
    check_against_masks(program, {"input_ids": torch.randint(0, 40, (2, 7))}, ("heads", "hidden"))


@pytest.mark.slow
def test_removing_units_of_a_pyramid_with_depthwise_convolutions() -> None:
    model = next(architecture for architecture in PVT if architecture.name == "pvt-tiny").build()
    program = lifted(model)
    check_against_masks(program, dict(program.example_inputs), ("heads", "hidden"))


MERGED = """
program "merged" lifted
dim batch in [1, inf]
input %x: f32[batch,6,8]
param %w: f32[48,8]
param %b: f32[48]
param %o: f32[8,16]
%y: f32[batch,6,48] = xf.linear(%x, %w, %b)
%q: f32[batch,6,16] = aten.slice.Tensor(%y) {dim=2, start=0, end=16}
%k: f32[batch,6,16] = aten.slice.Tensor(%y) {dim=2, start=16, end=32}
%v: f32[batch,6,16] = aten.slice.Tensor(%y) {dim=2, start=32, end=48}
%a: f32[batch,6,16] = xf.attention(%q, %k, %v) {heads=4, kv_heads=4, scale=0.5}
%z: f32[batch,6,8] = xf.linear(%a, %o)
return z=%z
"""


def test_heads_of_a_merged_projection() -> None:
    program = Program.parse(MERGED)
    (heads,) = find_groups(program, "heads")
    assert heads.parameters["b", 0].reshape(3, 4, 4).tolist() == [[[u] * 4 for u in range(4)]] * 3
    check_against_masks(program, {"x": torch.randn(2, 6, 8)}, ("heads",))


RESHAPED = """
program "reshaped" lifted
dim batch in [1, inf]
input %x: f32[batch,6,8]
param %w: f32[12,8]
param %scale: f32[3]
param %o: f32[8,12]
%y: f32[batch,6,12] = xf.linear(%x, %w)
%p: f32[batch,6,3,4] = aten.reshape(%y) {shape=[-1, 6, 3, 4]}
%t: f32[batch,3,6,4] = aten.permute(%p) {dims=[0, 2, 1, 3]}
%e: f32[3,1] = aten.unsqueeze(%scale) {dim=1}
%e2: f32[3,1,1] = aten.unsqueeze(%e) {dim=1}
%m: f32[batch,3,6,4] = aten.mul.Tensor(%t, %e2)
%u: f32[batch,6,3,4] = aten.permute(%m) {dims=[0, 2, 1, 3]}
%j: f32[batch,6,12] = aten.reshape(%u) {shape=[-1, 6, 12]}
%g: f32[batch,6,12] = xf.activation(%j) {function=relu}
%z: f32[batch,6,8] = xf.linear(%g, %o)
return z=%z
"""


def test_reshapes_name_the_new_sizes() -> None:
    program = Program.parse(RESHAPED)
    (group,) = find_groups(program, "hidden")
    assert group.units == 3
    assert group.parameters["w", 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    pruned = check_against_masks(program, {"x": torch.randn(2, 6, 8)}, ("hidden",))
    assert pruned.parameters["scale"].shape[0] * 4 == pruned.parameters["w"].shape[0] < 12


WIDTH = """
program "width" lifted
dim batch in [1, inf]
input %x: f32[batch,6,4]
param %in.w: f32[8,4]
param %norm.w: f32[8]
param %up.w: f32[12,8]
param %down.w: f32[8,12]
param %head.w: f32[3,8]
%e: f32[batch,6,8] = xf.linear(%x, %in.w)
%n: f32[batch,6,8] = xf.rms_norm(%e, %norm.w) {eps=1e-05}
%u: f32[batch,6,12] = xf.linear(%n, %up.w)
%g: f32[batch,6,12] = xf.activation(%u) {function=relu}
%d: f32[batch,6,8] = xf.linear(%g, %down.w)
%s: f32[batch,6,8] = aten.add.Tensor(%e, %d)
%y: f32[batch,6,3] = xf.linear(%s, %head.w)
return y=%y
"""


def test_the_residual_width_is_one_group() -> None:
    program = Program.parse(WIDTH)
    (width,) = find_groups(program, "width")
    assert set(width.parameters) == {("in.w", 0), ("norm.w", 0), ("up.w", 1), ("down.w", 0), ("head.w", 1)}
    kept = torch.tensor([True, False, True, True, False, True, True, False])
    pruned = remove_units(program, {width: kept})
    check(pruned, deep=True)
    x = torch.randn(2, 6, 4)
    # by hand, with the norm over the channels that stay
    p = {name: value.double() for name, value in program.parameters.items()}
    e = x.double() @ p["in.w"][kept].t()
    n = e / (e.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.w"][kept]
    s = e + (n @ p["up.w"][:, kept].t()).relu() @ p["down.w"][kept].t()
    wanted = s @ p["head.w"][:, kept].t()
    found = pruned.run({"x": x})["y"]
    assert (found - wanted).norm() <= TOLERANCE * wanted.norm()


def test_what_a_norm_reads_is_neither_heads_nor_units() -> None:
    """Without some of its channels a norm has other statistics: removing them would not be masking them."""
    normed = MERGED.replace(
        "%z: f32[batch,6,8] = xf.linear(%a, %o)",
        "%n: f32[batch,6,16] = xf.rms_norm(%a) {eps=1e-05}\n%z: f32[batch,6,8] = xf.linear(%n, %o)",
    )
    assert find_groups(Program.parse(normed), "heads") == []


def test_an_operator_without_a_rule_keeps_what_it_touches() -> None:
    sorted_units = RESHAPED.replace("xf.activation(%j) {function=relu}", "aten.cumsum(%j) {dim=2}")
    groups = find_groups(Program.parse(sorted_units))
    assert any("aten.cumsum" in str(group.pinned) for group in groups if ("w", 0) in group.parameters)
