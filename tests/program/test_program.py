"""What a Program promises: copies that share, inputs that are checked, a fingerprint of what it computes."""

from __future__ import annotations

import pytest
import torch

from xformopt.errors import DataError, ProgramError
from xformopt.program import Dim, Program, interpret, path_of, shape_of, value_of

TEXT = """program "m" lifted
dim batch in [1, inf]
dim length in [2, 16]
input %x: f32[batch,length,8]
input %mask: i64[batch,length]
param %w: f32[8,8]
param %b: f32[8]
param %spare: f32[3]
%h: f32[batch,length,8] = xf.linear(%x, %w, %b)  # layer.0
%a: f32[batch,length,8] = xf.activation(%h) {function=gelu}  # layer.0.act
%unused: f32[batch,length,8] = aten.neg(%a)
%y: f32[batch,8] = xf.mean_pool(%a, %mask) {eps=1e-09}
return y=%y, hidden=%a valid keep %mask
"""


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


def inputs(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, length, 8), "mask": torch.ones(batch, length, dtype=torch.long)}


def test_interpreting_is_running_the_module(program: Program) -> None:
    given = inputs()
    ours, theirs = program.run(given), program.module()(*given.values())
    assert list(ours) == ["y", "hidden"]
    for value, other in zip(ours.values(), theirs, strict=True):
        assert torch.equal(value, other)


def test_inputs_may_be_slices_of_something_larger() -> None:
    viewed = Program.parse('program "v" lifted\ninput %x: f32[2,3]\n%y: f32[6] = aten.view(%x) {size=[6]}\nreturn y=%y')
    x = torch.randn(2, 4)[:, :-1]
    assert torch.equal(viewed.run({"x": x})["y"], x.flatten())


def test_observer_sees_every_value_once(program: Program) -> None:
    seen: list[str] = []
    interpret(program, inputs(), observe=lambda node, value: seen.append(node.name))
    assert seen == [node.name for node in program.graph.nodes if node.op != "output"]


def test_a_copy_shares_parameters_and_nothing_else(program: Program) -> None:
    copy = program.copy(name="other")
    assert all(copy.parameters[name] is value for name, value in program.parameters.items())
    assert copy.parameters is not program.parameters
    assert copy.dims is program.dims
    assert str(copy).splitlines()[1:] == str(program).splitlines()[1:]
    before = str(program)
    node = next(copy.nodes())
    node.replace_all_uses_with(node.args[0])
    copy.drop_unused()
    assert str(program) == before


def test_dropping_unused_values_and_parameters(program: Program) -> None:
    kept = program.copy().drop_unused()
    assert list(kept.parameters) == ["w", "b"]
    assert "unused" not in {node.name for node in kept.nodes()}
    given = inputs()
    assert torch.equal(kept.run(given)["y"], program.run(given)["y"])


def test_values_know_shape_and_path(program: Program) -> None:
    first = next(program.nodes())
    assert str(shape_of(program, first)) == "(batch, length, 8)"
    assert path_of(first) == "layer.0"
    assert value_of(first).dtype == torch.float32
    with pytest.raises(ProgramError, match="where a tensor is expected"):
        value_of(program.output_node)


def test_binding_gives_the_size_of_every_dimension(program: Program) -> None:
    assert program.bind(inputs(3, 7)) == {"batch": 3, "length": 7}


BAD_INPUTS = {
    "missing": ({"mask": None}, "Input 'mask' is missing: the program takes x, mask; given: x"),
    "unknown": ({"more": torch.zeros(1)}, "There is no input 'more': the program takes x, mask"),
    "dtype": ({"x": torch.zeros(2, 5, 8, dtype=torch.float64)}, r"x must be f32\[batch, length, 8\], but is f64"),
    "rank": ({"x": torch.zeros(2, 8)}, r"x must be f32\[batch, length, 8\], but is f32\[2, 8\]"),
    "fixed axis": ({"x": torch.zeros(2, 5, 9)}, r"axis 2 of \[2, 5, 9\] is 9 instead of 8"),
    "contradiction": ({"mask": torch.ones(2, 6, dtype=torch.long)}, r"axis 1 of \[2, 6\] is 6 instead of 5"),
    "range": ({"x": torch.zeros(2, 17, 8)}, r"length in \[2, 16\], but axis 1 is 17"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_inputs_that_do_not_fit_are_refused(
    program: Program, change: dict[str, torch.Tensor | None], message: str
) -> None:
    given = {name: value for name, value in {**inputs(), **change}.items() if value is not None}
    with pytest.raises(DataError, match=message) as caught:
        program.run(given)
    assert "\n" not in str(caught.value)


DEFAULTS = """program "m" lifted
dim batch in [1, inf]
dim few in [1, 3]
input %x: f32[batch,3]
input %ranks: i64[few] below 3 default ascending
input %past: f32[batch,3] default zeros
%some: f32[batch,few] = aten.index_select(%x, %ranks) {dim=1}
%sum: f32[batch,3] = aten.add.Tensor(%x, %past)
return some=%some, present=%sum
"""


def test_inputs_with_a_default_may_be_left_out() -> None:
    program = Program.parse(DEFAULTS)
    assert Program.parse(str(program)).inputs == program.inputs
    x = torch.randn(2, 3)
    found = program.run({"x": x})
    # a dimension that only left-out inputs have is as large as it may be
    assert program.bind({"x": x}) == {"batch": 2, "few": 3}
    assert torch.equal(found["some"], x)
    assert torch.equal(found["present"], x)
    given = program.run({"x": x, "ranks": torch.tensor([2]), "past": torch.ones(2, 3)})
    assert torch.equal(given["some"], x[:, 2:])
    assert torch.equal(given["present"], x + 1)
    with pytest.raises(DataError, match="'x' is missing"):
        program.run({"past": torch.ones(2, 3)})
    with pytest.raises(DataError, match="past must be"):
        program.run({"x": x, "past": torch.ones(3, 3)})
    assert program.fingerprint != Program.parse(DEFAULTS.replace(" default zeros", "")).fingerprint


def test_one_dimension_more() -> None:
    dims = Program.parse(DEFAULTS).dims
    longer = dims.extended(Dim("more", 1, 9))
    assert (dims.names, longer.names) == (("batch", "few"), ("batch", "few", "more"))
    assert [str(size) for size in longer.shape(longer.fake(("batch", "more"), torch.float32))] == ["batch", "more"]
    assert [str(size) for size in longer.shape(dims.fake(("batch", 4), torch.float32))] == ["batch", "4"]
    with pytest.raises(ProgramError, match="a dimension 'few' already"):
        dims.extended(Dim("few"))


def test_fingerprint_ignores_names_paths_and_examples(program: Program) -> None:
    renamed = TEXT.replace("%h", "%hidden_1").replace("layer.0", "block.7").replace('"m"', '"n"')
    renamed = renamed.replace("%w", "%weight")
    weights = {"weight": program.parameters["w"], **program.parameters}
    same = Program.parse(renamed, parameters=weights)
    same.example_inputs = inputs()
    assert same.fingerprint == program.fingerprint == program.copy().fingerprint


def test_fingerprint_is_stable_across_the_text(program: Program) -> None:
    again = Program.parse(str(program), parameters=program.parameters)
    assert again.fingerprint == program.fingerprint
    equal = {name: value.clone() for name, value in program.parameters.items()}
    assert Program.parse(str(program), parameters=equal).fingerprint == program.fingerprint


CHANGES = {
    "attribute": ("function=gelu}", "function=silu}"),
    "edge": ("xf.mean_pool(%a,", "xf.mean_pool(%h,"),
    "operator": ("aten.neg", "aten.abs"),
    "returned": ("hidden=%a", "hidden=%h"),
    "output name": ("hidden=%a", "state=%a"),
    "range": ("[2, 16]", "[2, 17]"),
    "level": ("lifted", "target"),
}


@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=CHANGES.keys())
def test_fingerprint_changes_with(program: Program, old: str, new: str) -> None:
    changed = Program.parse(TEXT.replace(old, new), parameters=program.parameters)
    assert changed.fingerprint != program.fingerprint


def test_fingerprint_changes_with_one_weight(program: Program) -> None:
    weight = program.parameters["w"].clone()
    weight[3, 3] += 1e-6
    changed = Program.parse(TEXT, parameters={**program.parameters, "w": weight})
    assert changed.fingerprint != program.fingerprint


def test_fingerprint_tells_swapped_weights_apart() -> None:
    text = TEXT.replace("param %b: f32[8]", "param %b: f32[8]\nparam %w2: f32[8,8]")
    text = text.replace("%unused: f32[batch,length,8] = aten.neg(%a)", "%u: f32[batch,length,8] = xf.linear(%a, %w2)")
    one = Program.parse(text.replace("xf.mean_pool(%a", "xf.mean_pool(%u"))
    swapped = {**one.parameters, "w": one.parameters["w2"], "w2": one.parameters["w"]}
    assert Program.parse(str(one), parameters=swapped).fingerprint != one.fingerprint


def test_dimensions(program: Program) -> None:
    dims = program.dims
    assert [str(dim) for dim in dims] == ["batch in [1, inf]", "length in [2, 16]"]
    assert dims.largest("length", 2048) == 16
    assert dims.largest("batch", 8) == 8
    assert len(set(dims.hints.values())) == 2
    assert all(dims[name].admits(hint) for name, hint in dims.hints.items())
    assert dims.specialized() == {}
    dims.check_sizes({"length": 2}, "here")
    with pytest.raises(ProgramError, match=r"here: length is 1, outside of length in \[2, 16\]"):
        dims.check_sizes({"length": 1}, "here")


def test_a_dimension_admits_its_bounds() -> None:
    assert [size for size in range(6) if Dim("d", 2, 4).admits(size)] == [2, 3, 4]
    assert Dim("d").admits(10**9)


def test_sizes_are_expressions_in_names(program: Program) -> None:
    text = TEXT.replace(
        "%unused: f32[batch,length,8] = aten.neg(%a)", "%c: f32[batch,2*length,8] = aten.cat([%a, %x]) {dim=1}"
    )
    twice = Program.parse(text.replace("hidden=%a", "hidden=%c"))
    size = shape_of(twice, twice.results[1])[1]
    assert str(size) == "2*length"
    assert twice.dims.evaluate(size, {"length": 7}) == 14
    assert twice.run(inputs())["hidden"].shape == (2, 10, 8)


def test_a_dimension_forced_by_an_operator_is_told() -> None:
    text = """program "m" captured
dim length in [9, inf]
input %x: f32[length]
param %w: f32[9]
%y: f32[9] = aten.add.Tensor(%x, %w)
return y=%y
"""
    assert Program.parse(text).dims.specialized() == {"length": 9}


def test_parameter_bytes(program: Program) -> None:
    assert program.parameter_bytes == (64 + 8 + 3) * 4


def test_a_parameter_may_be_named_inside_another() -> None:
    # as codes are that stand beside a weight which stays for another reader
    program = Program.parse("""
program "tied" lifted
input %x: f32[2,3]
param %w: f32[3,3]
param %w.codes: f32[3,3]
param %w_codes: f32[3,3]
%a: f32[2,3] = aten.mm(%x, %w)
%b: f32[2,3] = aten.mm(%a, %w.codes)
%c: f32[2,3] = aten.mm(%b, %w_codes)
return c=%c
""")
    x = torch.randn(2, 3)
    torch.testing.assert_close(program.module()(x)[0], program.run({"x": x})["c"])
