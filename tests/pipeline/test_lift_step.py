"""The pipeline's first step, where there is nothing for it to rewrite."""

from __future__ import annotations

import torch
from torch import nn

import xformopt as xo
from xformopt.kernels.definition import xf
from xformopt.program import Level


class Written(nn.Module):
    """Calls the dialect itself, and nothing else that has a form in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply one operator."""
        return xf.activation(x, function="silu")


def test_a_model_written_in_the_dialect_is_lifted_as_it_is() -> None:
    program = xo.capture(Written(), torch.randn(2, 5, 4))
    assert program.level == Level.CAPTURED
    result = xo.Pipeline.recipe("exact").run(program, target="ort-cpu")
    assert result.program.level == Level.LIFTED
    assert program.level == Level.CAPTURED
    lift = result.history[0]
    assert (lift.name, lift.fired, lift.relative_l2) == ("lift", 0, 0.0)
