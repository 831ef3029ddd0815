from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xformopt.capture.factory import bind_inputs, load_factory
from xformopt.errors import CaptureError, UsageError

Write = Callable[[str], str]
COUNT = itertools.count()
HEADER = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
    def forward(self, x, scale=None, *rest, **named):
        return self.linear(x)

class WithInputs(Net):
    def example_inputs(self):
        return {"x": torch.ones(2, 3)}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module with a fresh name into the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_module(body: str) -> str:
        name = f"user_model_{next(COUNT)}"
        Path(f"{name}.py").write_text(HEADER + body)
        return name

    return write_module


def refuse(spec: str, *fragments: str) -> None:
    with pytest.raises(CaptureError) as caught:
        load_factory(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("body", "name", "inputs"),
    [
        ("def make(): return Net(), torch.ones(2, 3)", "make", ["x"]),
        ("def make(): return Net(), (torch.ones(2, 3), torch.ones(1))", "make", ["x", "scale"]),
        ("def make(): return Net(), {'scale': torch.ones(1), 'x': torch.ones(2, 3)}", "make", ["x", "scale"]),
        ("def make(): return Net(), [torch.ones(2, 3)] * 4", "make", ["x", "scale", "rest_0", "rest_1"]),
        ("def make(): return Net(), {'x': torch.ones(2, 3), 'extra': torch.ones(1)}", "make", ["x", "extra"]),
        ("def make(): return WithInputs()", "make", ["x"]),
        ("", "WithInputs", ["x"]),
        ("model = WithInputs()", "model", ["x"]),
        ("class Box:\n    make = staticmethod(lambda: WithInputs())", "Box.make", ["x"]),
    ],
)
def test_what_a_factory_may_return(body: str, name: str, inputs: list[str], write: Write) -> None:
    source = load_factory(f"{write(body)}:{name}")
    assert list(source.example_inputs) == inputs
    assert not source.module.training
    assert not any(parameter.requires_grad for parameter in source.module.parameters())
    assert name in source.description


def test_the_working_directory_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    (tmp_path / "only_here.py").write_text(HEADER)
    assert load_factory("only_here:WithInputs").example_inputs["x"].shape == (2, 3)


def test_other_dtypes_are_noted(write: Write) -> None:
    source = load_factory(f"{write('def make(): return Net().half(), torch.ones(2, 3)')}:make")
    assert source.notes == ("the module has float16 parameters, kept as they are",)


@pytest.mark.parametrize("spec", ["module", ":make", "module:", "a b:c", "module:make()", "a:b:c", "a/b:c"])
def test_not_a_spec(spec: str) -> None:
    with pytest.raises(UsageError, match=r"package\.module:name"):
        load_factory(spec)


def test_module_that_does_not_exist(write: Write) -> None:
    refuse("absent_module.inner:make", 'no Python module "absent_module"', "working directory")


def test_module_with_an_import_that_does_not_exist(write: Write) -> None:
    name = write("import absent_dependency")
    refuse(f"{name}:make", "ModuleNotFoundError", "absent_dependency", f"{name}.py, line")


def test_module_that_does_not_parse(write: Write) -> None:
    name = write("def make(:\n")
    refuse(f"{name}:make", "SyntaxError", f"{name}.py, line 14")


def test_name_that_does_not_exist(write: Write) -> None:
    refuse(f"{write('def make_model(): pass')}:make_modle", 'no "make_modle"', 'Did you mean "make_model"?')


def test_not_callable(write: Write) -> None:
    refuse(f"{write('make = 3')}:make", "is a int, which cannot be called")


def test_factory_with_required_parameters(write: Write) -> None:
    refuse(f"{write('def make(size): return Net()')}:make", "without arguments", "'size'")


def test_factory_that_raises(write: Write) -> None:
    name = write("def make():\n    raise ValueError('two\\nlines')")
    refuse(f"{name}:make", "ValueError: two lines", f"{name}.py, line 15")


@pytest.mark.parametrize("value", ["3", "None", "(1, 2)", "{'model': Net()}"])
def test_factory_that_returns_something_else(value: str, write: Write) -> None:
    refuse(f"{write(f'def make(): return {value}')}:make", "returned a", "Return a torch.nn.Module")


def test_no_example_inputs(write: Write) -> None:
    refuse(f"{write('')}:Net", "no example inputs", "example_inputs()")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("None", "NoneType without tensors"),
        ("()", "tuple without tensors"),
        ("{'scale': torch.ones(1)}", "missing a required argument: 'x'"),
        ("{'x': 3}", 'example input "x"'),
        ("(torch.ones(2, 3), None)", 'example input "scale"'),
    ],
)
def test_example_inputs_that_do_not_fit(value: str, message: str, write: Write) -> None:
    refuse(f"{write(f'def make(): return Net(), {value}')}:make", message)


def test_too_many_example_inputs() -> None:
    with pytest.raises(CaptureError, match=r"too many positional arguments.*forward|forward\(input\)"):
        bind_inputs(torch.nn.Linear(2, 2), (torch.ones(2), torch.ones(2)), "the test")


def test_parameters_that_are_not_finite(write: Write) -> None:
    body = "def make():\n net = Net()\n net.linear.bias.data[0] = float('nan')\n return net, torch.ones(3)"
    refuse(f"{write(body)}:make", '"linear.bias"', "1 of 3")
