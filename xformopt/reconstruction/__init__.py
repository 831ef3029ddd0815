"""Block-wise reconstruction: training parameters of a changed program until its blocks do what the original's do."""

from __future__ import annotations

from xformopt.reconstruction.blocks import Block, cut_at, cut_blocks, cut_like
from xformopt.reconstruction.loop import Make, Reconstruction, Settings, Trained, reconstruct
from xformopt.reconstruction.training import Attempt, Objective, squared_error
from xformopt.reconstruction.values import Transform, run_block
from xformopt.reconstruction.variables import Free, Positive, Rounding, Variable

__all__ = [
    "Attempt",
    "Block",
    "Free",
    "Make",
    "Objective",
    "Positive",
    "Reconstruction",
    "Rounding",
    "Settings",
    "Trained",
    "Transform",
    "Variable",
    "cut_at",
    "cut_blocks",
    "cut_like",
    "reconstruct",
    "run_block",
    "squared_error",
]
