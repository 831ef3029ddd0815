"""Capture of torch modules: dimensions, names, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xformopt as xo
from xformopt.errors import CaptureError


class Pair(nn.Module):
    """Two inputs of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a named sum."""
        return {"total": self.linear(x) + y}


class Counting(nn.Module):
    """Writes to a buffer while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count the calls."""
        self.count += 1
        return x + self.count


class Deciding(nn.Module):
    """Decides by the values of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take one of two ways."""
        if x.sum() > 0:
            return x * 2
        return x


class Growing(nn.Module):
    """Operators whose compiled shape rules read sizes as plain numbers."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        padded = nn.functional.pad(x[:, :, -3:], (0, 0, 0, 4))
        return {"padded": padded, "doubled": nn.functional.interpolate(x, scale_factor=2.0)}


def test_padding_and_interpolation_leave_the_batch_free() -> None:
    program = xo.capture(Growing(), torch.randn(2, 3, 8, 8))
    for batch in (1, 3):
        found = program.run({"x": torch.randn(batch, 3, 8, 8)})
        assert found["padded"].shape == (batch, 3, 7, 8)
        assert found["doubled"].shape == (batch, 3, 16, 16)


def test_every_module_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[1].eval()
    xo.capture(model, torch.randn(2, 4))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_one_name_is_one_dimension() -> None:
    program = xo.capture(Pair(), (torch.randn(1, 4), torch.randn(1, 4)))
    assert program.dims.names == ("batch",)
    assert program.input_names == ("x", "y")
    assert program.output_names == ("total",)
    assert program.run({"x": torch.randn(7, 4), "y": torch.randn(7, 4)})["total"].shape == (7, 4)


def test_bounds_are_kept() -> None:
    program = xo.capture(Pair(), (torch.randn(2, 4), torch.randn(2, 4)), {"x": {0: ("rows", 1, 8)}})
    assert str(program.dims["rows"]) == "rows in [1, 8]"


@pytest.mark.parametrize(("model", "said"), [(Counting(), "count"), (Deciding(), "values of a tensor")])
def test_what_cannot_be_captured_is_told_in_one_paragraph(model: nn.Module, said: str) -> None:
    with pytest.raises(CaptureError) as error:
        xo.capture(model, torch.randn(2, 4))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
