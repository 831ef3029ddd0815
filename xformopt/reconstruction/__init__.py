"""Block-wise reconstruction: training parameters of a changed program until its blocks do what the original's do."""

from __future__ import annotations

from xformopt.reconstruction.alignment import Aligned, align
from xformopt.reconstruction.blocks import Block, cut_at, cut_blocks, cut_like, residual_values
from xformopt.reconstruction.gradients import stopped_gradients
from xformopt.reconstruction.loop import Make, Reconstruction, Trained, reconstruct
from xformopt.reconstruction.settings import Settings
from xformopt.reconstruction.training import Attempt, Objective, squared_error
from xformopt.reconstruction.values import Transform, run_block
from xformopt.reconstruction.variables import Free, LowRank, Positive, Rounding, Variable

__all__ = [
    "Aligned",
    "Attempt",
    "Block",
    "Free",
    "LowRank",
    "Make",
    "Objective",
    "Positive",
    "Reconstruction",
    "Rounding",
    "Settings",
    "Trained",
    "Transform",
    "Variable",
    "align",
    "cut_at",
    "cut_blocks",
    "cut_like",
    "reconstruct",
    "residual_values",
    "run_block",
    "squared_error",
    "stopped_gradients",
]
