"""Rules fire or say why not, and every application leaves both forms to be compared."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import fx

from xformopt.program import Program, interpret, path_of
from xformopt.rewrite import Editor, Fired, Region, Reject, rewrite, trace_region

aten = torch.ops.aten
TEXT = """program "m" captured
dim n in [1, inf]
input %x: f32[n,4]
param %w: f32[4,4]
%a: f32[n,4] = aten.add.Tensor(%x, %x)  # first
%b: f32[n,4] = aten.relu(%a)  # second
%c: f32[n,4] = aten.add.Tensor(%b, %b)  # third
%d: f32[n,4] = aten.linear(%c, %w)  # fourth
return y=%d, z=%b
"""


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


def double(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``x + x`` is ``2 x``."""
    if node.target is not aten.add.Tensor or node.args[0] is not node.args[1]:
        return None
    return editor.call(aten.mul.Scalar, node.args[0], 2)


def operators(program: Program) -> list[str]:
    return [node.target._opname for node in program.nodes()]  # type: ignore[union-attr]


def run_region(region: Region, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Execute a region as it stands."""
    module = fx.GraphModule(dict(region.parameters), region.graph)
    return tuple(module(*(inputs[name] for name in region.inputs)))


def check_equal(program: Program, fired: Fired) -> None:
    """Run both sides of an application on the values that the program itself computes there."""
    values: dict[str, torch.Tensor] = {}
    interpret(program, {"x": torch.randn(3, 4)}, observe=lambda node, value: values.update({node.name: value}))
    assert set(fired.before.inputs) | set(fired.after.inputs) <= set(values)
    before, after = run_region(fired.before, values), run_region(fired.after, values)
    assert len(before) == len(after) == len(fired.before.outputs) == len(fired.after.outputs)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new)


def test_fires_everywhere_and_leaves_the_input_alone(program: Program) -> None:
    before = str(program)
    done = rewrite(program, [double])
    assert operators(done.program) == ["mul", "relu", "mul", "linear"]
    assert str(program) == before
    assert [(fired.rule, fired.path) for fired in done.fired] == [("double", "first"), ("double", "third")]
    x = {"x": torch.randn(5, 4)}
    assert torch.equal(done.program.run(x)["y"], program.run(x)["y"])


def test_new_values_carry_shape_and_path(program: Program) -> None:
    node = next(rewrite(program, [double]).program.nodes())
    assert path_of(node) == "first"
    assert str(Program.parse(str(rewrite(program, [double]).program)))


def test_a_second_run_finds_nothing(program: Program) -> None:
    once = rewrite(program, [double])
    again = rewrite(once.program, [double])
    assert again.fired == ()
    assert again.program.fingerprint == once.program.fingerprint


def test_regions_compute_the_same(program: Program) -> None:
    done = rewrite(program, [double])
    assert len(done.fired) == 2
    for fired in done.fired:
        check_equal(program, fired)


def test_a_wrong_rule_is_seen_in_its_region(program: Program) -> None:
    def triple(editor: Editor, node: fx.Node) -> fx.Node | None:
        return editor.call(aten.mul.Scalar, node.args[0], 3) if node.target is aten.add.Tensor else None

    (fired, *_) = rewrite(program, [triple]).fired
    with pytest.raises(AssertionError, match="not close"):
        check_equal(program, fired)


def test_rejections_are_recorded_with_rule_value_and_place(program: Program) -> None:
    def refuse(editor: Editor, node: fx.Node) -> Reject | None:
        return Reject("the sum is precious") if node.target is aten.add.Tensor else None

    done = rewrite(program, [refuse])
    assert done.fired == ()
    assert [(r.rule, r.value, r.path, r.reason) for r in done.rejected] == [
        ("refuse", "a", "first", "the sum is precious"),
        ("refuse", "c", "third", "the sum is precious"),
    ]
    assert done.program.fingerprint == program.fingerprint


def test_a_candidate_that_fires_later_is_not_listed(program: Program) -> None:
    def after_the_relu(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        if node.target is not aten.linear.default:
            return None
        if any(n.target is aten.relu.default for n in editor.program.nodes()):
            return Reject("a relu comes before")
        return editor.call(aten.neg.default, node.args[0])

    def drop_relu(editor: Editor, node: fx.Node) -> fx.Node | None:
        return editor.call(aten.abs.default, node.args[0]) if node.target is aten.relu.default else None

    done = rewrite(program, [after_the_relu, drop_relu])
    assert done.rejected == ()
    assert operators(done.program)[-1] == "neg"


def test_refused_and_unused_attempts_leave_no_values(program: Program) -> None:
    def attempt(editor: Editor, node: fx.Node) -> Reject | None:
        if node.target is not aten.relu.default:
            return None
        editor.call(aten.neg.default, editor.call(aten.abs.default, node.args[0]))
        return Reject("tried and left")

    assert operators(rewrite(program, [attempt]).program) == operators(program)


def test_a_call_that_does_not_fit_leaves_nothing(program: Program) -> None:
    def misfit(editor: Editor, node: fx.Node) -> None:
        if node.target is aten.linear.default:
            with pytest.raises(Exception, match="same reduction dim"):
                editor.call(aten.mm.default, node.args[0], node.args[0])

    assert operators(rewrite(program, [misfit]).program) == operators(program)


def test_several_outputs_are_replaced_at_once(program: Program) -> None:
    def both(editor: Editor, node: fx.Node) -> dict[fx.Node, fx.Node] | None:
        if node.target is not aten.relu.default or node.args[0].target is not aten.add.Tensor:  # type: ignore[union-attr]
            return None
        total = node.args[0]
        assert isinstance(total, fx.Node)
        new_total = editor.call(aten.mul.Scalar, total.args[0], 2)
        return {node: editor.call(aten.clamp_min.default, new_total, 0), total: new_total}

    text = TEXT.replace("z=%b", "z=%a")
    program = Program.parse(text)
    done = rewrite(program, [both])
    (fired,) = done.fired
    assert fired.before.outputs == ("b", "a")
    check_equal(program, fired)
    assert operators(done.program) == ["mul", "clamp_min", "add", "linear"]
    x = {"x": torch.randn(2, 4)}
    for name, value in program.run(x).items():
        assert torch.equal(done.program.run(x)[name], value)


def test_a_value_may_be_replaced_by_an_earlier_one(program: Program) -> None:
    def no_relu(editor: Editor, node: fx.Node) -> fx.Node | None:
        return node.args[0] if node.target is aten.relu.default else None  # type: ignore[return-value]

    done = rewrite(program, [no_relu])
    assert operators(done.program) == ["add", "add", "linear"]
    assert done.fired[0].after.outputs == ("a",)
    assert done.fired[0].after.inputs == ("a",)


def test_parameters_are_added_under_names_of_their_own(program: Program) -> None:
    def scaled(editor: Editor, node: fx.Node) -> fx.Node | None:
        weight = editor.constant(node.args[1]) if node.target is aten.linear.default else None
        if weight is None or len(node.args) > 2:
            return None
        return editor.call(
            aten.linear.default, node.args[0], editor.parameter("w", weight * 2), editor.parameter("b", torch.ones(4))
        )

    done = rewrite(program, [scaled])
    assert set(done.program.parameters) == {"w_1", "b"}
    assert set(program.parameters) == {"w"}
    assert set(done.fired[0].before.parameters) == {"w"}
    assert set(done.fired[0].after.parameters) == {"w_1", "b"}


def test_an_equal_parameter_is_read_not_added(program: Program) -> None:
    program = program.copy()
    editor = Editor(program).at(program.results[0])
    weight = program.parameters["w"]
    assert editor.parameter("w", weight) is next(iter(program.graph.find_nodes(op="get_attr")))
    assert editor.constant(program.results[0]) is None
    assert list(program.parameters) == ["w"]


def test_rules_meet_a_value_in_order(program: Program) -> None:
    def first(editor: Editor, node: fx.Node) -> fx.Node | None:
        return editor.call(aten.neg.default, node.args[0]) if node.target is aten.relu.default else None

    def second(editor: Editor, node: fx.Node) -> fx.Node | None:
        return editor.call(aten.abs.default, node.args[0]) if node.target is aten.relu.default else None

    assert "neg" in operators(rewrite(program, {"one": first, "two": second}).program)
    assert "abs" in operators(rewrite(program, {"two": second, "one": first}).program)


def test_endless_rules_are_stopped(program: Program) -> None:
    def flip(editor: Editor, node: fx.Node) -> fx.Node | None:
        return editor.call(aten.relu.default, node.args[0]) if node.target is aten.relu.default else None

    assert len(rewrite(program, [flip], sweeps=3).fired) == 3


def test_a_region_stops_at_its_boundary(program: Program) -> None:
    a, b, c, d = program.nodes()
    region = trace_region(program, [d], [b])
    assert region.inputs == ("b",)
    assert region.outputs == ("d",)
    assert [node.target for node in region.graph.nodes if node.op == "call_function"] == [c.target, d.target]
    assert trace_region(program, [a], []).inputs == ("x",)
