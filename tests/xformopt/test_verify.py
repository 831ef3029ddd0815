"""A Program that is not well formed is refused with the value named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from xformopt.errors import ProgramError
from xformopt.program import Level, Output, Program
from xformopt.verify import check

TEXT = """program "m" {level}
dim batch in [1, inf]
input %x: f32[batch,8]
param %w: f32[4,8]
{body}
return y=%y valid keep %x
"""
LINEAR = "%y: f32[batch,4] = xf.linear(%x, %w)  # encoder.layer"


def parse(body: str = LINEAR, level: str = "lifted") -> Program:
    return Program.parse(TEXT.format(body=body, level=level))


def node(program: Program, name: str) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


@pytest.mark.parametrize("level", ["lifted", "target"])
def test_accepts(level: str) -> None:
    check(parse(level=level), deep=True)


def test_does_not_change_the_program() -> None:
    program = parse()
    text = str(program)
    check(program, deep=True)
    assert str(program) == text


@pytest.mark.parametrize(
    ("body", "level", "reason"),
    [
        (LINEAR, "captured", "%y at encoder.layer calls xf.linear, an operator of level lifted"),
        ("%y: f32[batch,4] = aten.linear(%x, %w)", "lifted", "calls aten.linear, which is written xf.linear"),
        ("%y: f32[batch,4] = aten.linear(%x, %w)", "target", "calls aten.linear, which is written xf.linear"),
        ("%y: f32[batch,4] = xf.linear_activation(%x, %w) {function=relu}", "lifted", "an operator of level target"),
        ("%l: f32[batch,4] = xf.linear(%x, %w)\n%y: f32[batch,4] = aten.add_.Tensor(%l, 1)", "lifted", "in place"),
    ],
)
def test_refuses_operators_of_another_level(body: str, level: str, reason: str) -> None:
    with pytest.raises(ProgramError, match=reason):
        check(parse(body, level))


def test_level_can_be_asked_for() -> None:
    program = parse("%y: f32[batch,4] = aten.linear(%x, %w)", "captured")
    check(program)
    with pytest.raises(ProgramError, match=r"aten\.linear"):
        check(program, Level.LIFTED)


def test_layer_norm_over_two_axes_has_no_form() -> None:
    text = """program "m" lifted
input %x: f32[2,3,4]
%y: f32[2,3,4] = aten.layer_norm(%x) {normalized_shape=[3, 4]}
return y=%y
"""
    check(Program.parse(text))


def _forget_shape(program: Program) -> None:
    del node(program, "y").meta["val"]


def _wrong_shape(program: Program) -> None:
    node(program, "y").meta["val"] = program.dims.fake(("batch", 5), torch.float32)


def _wrong_order(program: Program) -> None:
    first = next(iter(program.graph.nodes))
    first.prepend(node(program, "y"))


def _lose_parameter(program: Program) -> None:
    program.parameters.clear()


def _other_parameter(program: Program) -> None:
    program.parameters["w"] = torch.zeros(4, 7)


def _unread_parameter(program: Program) -> None:
    program.parameters["spare"] = torch.zeros(1)


def _rename_input(program: Program) -> None:
    program.inputs = (replace(program.inputs[0], name="z"),)


def _reshape_input(program: Program) -> None:
    program.inputs = (replace(program.inputs[0], shape=("batch", 9)),)


def _extra_output(program: Program) -> None:
    program.outputs += (Output("z"),)


def _same_output(program: Program) -> None:
    program.outputs = (Output("y"), Output("y"))
    program.output_node.args = ((node(program, "y"), node(program, "y")),)


def _unknown_mask(program: Program) -> None:
    program.outputs = (Output("y", mask="mask"),)


def _return_number(program: Program) -> None:
    program.output_node.args = ((1,),)


def _foreign_function(program: Program) -> None:
    node(program, "y").target = torch.nn.functional.linear


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_forget_shape, "%y at encoder.layer has no shape"),
        (_wrong_shape, r"recorded as f32\[batch,5\], but xf.linear computes f32\[batch,4\]"),
        (_wrong_order, "%y at encoder.layer reads %x, which is not defined above it"),
        (_lose_parameter, "reads the parameter 'w', which does not exist"),
        (_other_parameter, r"is f32\[4,8\], but its parameter is f32\[4,7\]"),
        (_unread_parameter, "nothing reads its parameter 'spare'"),
        (_rename_input, "its graph takes x, but its inputs are z"),
        (_reshape_input, r"%x is f32\[batch,8\], but its input is declared f32\[batch,9\]"),
        (_extra_output, "returns 1 values, but has 2 outputs"),
        (_same_output, "output names repeat"),
        (_unknown_mask, "valid where 'mask' says so, but there is no such input"),
        (_return_number, "must return a tuple of values"),
        (_foreign_function, "calls python.linear, which is neither an ATen operator"),
    ],
)
def test_refuses_damage(damage: Callable[[Program], None], reason: str) -> None:
    program = parse()
    damage(program)
    with pytest.raises(ProgramError, match=reason):
        check(program, deep=True)
