"""What the README shows works: its pass runs, verified, and refuses what it should."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch

import xformopt as xo

README = Path(__file__).parent.parent / "README.md"
PROGRAM = """program "two layers" lifted
dim batch in [1, inf]
input %x: f32[batch,4]
param %a.weight: f32[4,4]
param %a.bias: f32[4]
param %b.weight: f32[4,4]
param %b.bias: f32[4]
%a: f32[batch,4] = xf.linear(%x, %a.weight, %a.bias)
%b: f32[batch,4] = xf.linear(%a, %b.weight, %b.bias)
return y=%b
"""


def readme_pass() -> type[xo.Pass]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    source = next(block for block in blocks if "class DropZeroBias" in block)
    module = types.ModuleType("readme_pass")
    # a dataclass looks its module up by name
    sys.modules[module.__name__] = module
    exec(compile(source, "README.md", "exec"), module.__dict__)
    return module.DropZeroBias


def test_the_pass_of_the_readme_runs() -> None:
    program = xo.Program.parse(PROGRAM)
    program.parameters["a.bias"] = torch.zeros(4)
    result = xo.Pipeline([readme_pass()()]).run(program)
    record = result.history[0]
    assert (record.name, record.fired) == ("drop-zero-bias", 1)
    assert next(reason for reason, _ in record.rejected).startswith("the bias reaches")
    assert "xf.linear(%x, %a.weight)" in str(result.program)


def test_both_commands_are_there() -> None:
    for command in ("tools/demo", "tools/test"):
        assert (README.parent / command).stat().st_mode & 0o111
        assert command in README.read_text()
