"""A Program's text says everything and is read back as what it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xformopt.errors import ProgramError
from xformopt.program import Level, Program

HEAD = """program "m" captured
dim batch in [1, inf]
dim length in [1, 512]
input %x: f32[batch,length,8]
input %ids: i64[batch,length] below 97
input %mask: i64[batch,length]
param %w.0: f32[8,8]
param %table: f32[97,8]
"""


def parse(*lines: str, returns: str = "y=%y") -> Program:
    return Program.parse(HEAD + "\n".join(lines) + f"\nreturn {returns}\n")


SAMPLES = {
    "attributes": ["%y: f32[batch,length,8] = xf.rms_norm(%x) {eps=1e-06}  # encoder.layer.0.norm"],
    "skipped optional tensor": [
        "%y: f32[batch,length,8] = xf.attention(%x, %x, %x, none, none, none) {heads=2, kv_heads=2, scale=0.5}"
    ],
    "strings": ['%y: f32[batch,length,8] = aten.gelu(%x) {approximate="tanh"}'],
    "plain words": ["%y: f32[batch,length,8] = xf.activation(%x) {function=gelu_quick}"],
    "dtypes": ["%y: f16[batch,length,8] = aten._to_copy(%x) {dtype=f16}"],
    "infinities": [
        "%m: bool[batch,length] = aten.eq.Scalar(%mask) {other=0}",
        "%y: f32[batch,length,8] = aten.clamp(%x) {min=-inf, max=inf}",
    ],
    "lists of tensors": ["%y: f32[batch,2*length,8] = aten.cat([%x, %x]) {dim=1}"],
    "sizes": [
        "%n: size[length] = aten.sym_size.int(%x) {dim=1}",
        "%m: size[length+1] = size.add(%n, 1)",
        "%y: i64[length+1] = aten.arange() {end=%m}",
    ],
    "tuples": [
        "%s: (f32[batch,length,4], f32[batch,length,4]) = aten.split.Tensor(%x) {split_size=4, dim=-1}",
        "%y: f32[batch,length,4] = size.getitem(%s, 1)",
    ],
    "lookup": ["%y: f32[batch,length,8] = aten.embedding(%table, %ids)"],
}


@pytest.mark.parametrize("lines", SAMPLES.values(), ids=SAMPLES.keys())
def test_printed_text_is_a_fixed_point(lines: list[str]) -> None:
    program = parse(*lines)
    assert str(Program.parse(str(program))) == str(program)


def test_trailing_defaults_are_no_arguments() -> None:
    program = parse("%y: f32[batch,length,8] = xf.linear(%x, %w.0)")
    assert len(next(program.nodes()).args) == 2


def test_text_carries_everything_but_weights() -> None:
    program = parse("%y: f32[batch,length,8] = xf.linear(%x, %w.0)  # head", returns="y=%y valid padding %mask")
    again = Program.parse(str(program), parameters=program.parameters)
    assert (again.inputs, again.outputs, again.level, again.name) == (
        program.inputs,
        program.outputs,
        Level.CAPTURED,
        "m",
    )
    assert again.inputs[1].bound == 97
    assert again.outputs[0].mask_means == "padding"
    assert next(again.nodes()).meta["path"] == "head"
    assert again.fingerprint == program.fingerprint


def test_weights_are_drawn_from_the_seed_by_name() -> None:
    text = HEAD + "%y: f32[batch,length,8] = xf.linear(%x, %w.0)\nreturn y=%y\n"
    one, same, other = Program.parse(text), Program.parse(text), Program.parse(text, seed=1)
    assert torch.equal(one.parameters["w.0"], same.parameters["w.0"])
    assert not torch.equal(one.parameters["w.0"], other.parameters["w.0"])


BAD = {
    "no header": ("input %x: f32[2]\nreturn y=%x", 'must begin with: program "name" level'),
    "empty": ("", 'must begin with: program "name" level'),
    "level": ('program "m" lowered\nreturn y=%x', "Level 'lowered' is not one of captured, lifted, target"),
    "dim": ('program "m" captured\ndim batch from 1 to 9\nreturn y=%x', r"must read 'dim NAME in \[LOW, HIGH\]'"),
    "no return": (HEAD, "has no return line"),
    "junk": (HEAD + "hello\nreturn y=%x", "Line 9 .* expected input, param, return or %value: hello"),
    "type": (HEAD + "param %b: float[8]\nreturn y=%x", r"Line 9 .* 'float\[8\]' is not a type such as f32"),
    "undeclared dim": (HEAD + "input %z: f32[rows]\nreturn y=%x", "Line 9 .* dimension 'rows' is not declared"),
    "input form": (HEAD + "input z f32[8]\nreturn y=%x", "Line 9 .* an input must read 'input %NAME: TYPE'"),
    "param form": (HEAD + "param b f32[8]\nreturn y=%x", "Line 9 .* a parameter must read 'param %NAME: TYPE'"),
    "value form": (HEAD + "%y = aten.relu(%x)\nreturn y=%x", "Line 9 .* a value must read '%NAME: TYPE = OPERATOR"),
    "twice": (HEAD + "param %w.0: f32[8,8]\nreturn y=%x", "Line 9 .* %w.0 is defined twice"),
    "operator": (HEAD + "%y: f32[8] = xf.nothing(%x)\nreturn y=%y", "Line 9 .* there is no operator xf.nothing"),
    "namespace": (HEAD + "%y: f32[8] = os.system(%x)\nreturn y=%y", "Line 9 .* there is no operator os.system"),
    "overload": (HEAD + "%y: f32[8] = aten.add.Nope(%x)\nreturn y=%y", "Line 9 .* there is no operator aten.add.Nope"),
    "undefined": (HEAD + "%y: f32[8] = aten.relu(%z)\nreturn y=%y", "Line 9 .* %z is not defined above"),
    "attribute": (HEAD + "%y: f32[8] = aten.relu(%x) {slope=1}\nreturn y=%y", "has no attribute 'slope'"),
    "wrong type": (HEAD + "%y: f32[batch,8] = aten.relu(%x)\nreturn y=%y", r"returns f32\[batch,length,8\]"),
    "refused": (HEAD + "%y: f32[8] = aten.mm(%x, %table)\nreturn y=%y", "the operator refuses its arguments"),
    "missing attribute": (HEAD + "%y: i64[4] = aten.arange()\nreturn y=%y", "refuses its arguments"),
    "comma": (HEAD + "%y: f32[8] = aten.add.Tensor(%x %x)\nreturn y=%y", "expected ',' instead of '%x'"),
    "unclosed": (HEAD + "%y: f32[8] = aten.relu(%x\nreturn y=%y", "instead of 'the end of the line'"),
    "trailing": (HEAD + "%y: f32[8] = aten.relu(%x) %x\nreturn y=%y", "unexpected '%x'"),
    "characters": (HEAD + "%y: f32[8] = aten.relu(%x, $)\nreturn y=%y", r"cannot read .*\$"),
    "returned": (HEAD + "return y=%nothing", "'y=%nothing' does not return a value"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_parse_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        Program.parse(text)
    assert "\n" not in str(caught.value)


def test_given_weights_must_fit() -> None:
    with pytest.raises(ProgramError, match=r"weights do not hold this parameter \(it is missing\): param %w.0"):
        Program.parse(HEAD + "return y=%x", parameters={})
    with pytest.raises(ProgramError, match=r"it is torch.float32 \(3,\)"):
        Program.parse(HEAD + "return y=%x", parameters={"w.0": torch.zeros(3)})


UNARY = ("aten.relu", "aten.neg", "aten.tanh", "xf.activation", "xf.rms_norm", "aten.mul.Scalar")
BINARY = ("aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "xf.glu")
ATTRIBUTES = {
    "xf.activation": " {function=silu}",
    "xf.glu": " {function=gelu}",
    "xf.rms_norm": " {eps=1e-05}",
    "aten.mul.Scalar": " {other=-2.5}",
}


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Text of a random program of pointwise operators, linear layers and transpositions back and forth."""
    lines, values = [], ["x"]
    for number in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from((*UNARY, *BINARY, "xf.linear")))
        operands = [f"%{draw(st.sampled_from(values))}" for _ in range(2 if kind in BINARY else 1)]
        if kind == "xf.linear":
            operands.append("%w.0")
        path = draw(st.sampled_from(("", "  # layer.0", "  # layer.1.mlp")))
        inside = ", ".join(operands)
        lines.append(f"%v{number}: f32[batch,length,8] = {kind}({inside}){ATTRIBUTES.get(kind, '')}{path}")
        values.append(f"v{number}")
    results = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=2, unique=True))
    returned = ", ".join(f"out_{value}=%{value}" for value in results)
    return HEAD + "\n".join(lines) + f"\nreturn {returned}\n"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(programs())
def test_any_program_survives_its_text(text: str) -> None:
    program = Program.parse(text)
    again = Program.parse(str(program), parameters=program.parameters)
    assert str(again) == str(program)
    assert again.fingerprint == program.fingerprint
    inputs = {
        "x": torch.randn(2, 3, 8),
        "ids": torch.zeros(2, 3, dtype=torch.long),
        "mask": torch.ones(2, 3, dtype=torch.long),
    }
    ours, theirs = program.run(inputs), program.module()(*inputs.values())
    for (name, value), other in zip(ours.items(), theirs, strict=True):
        assert torch.equal(value, other)
        assert torch.equal(value, again.run(inputs)[name])
