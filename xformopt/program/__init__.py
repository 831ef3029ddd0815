"""The IR: Program, its dimensions, its text, its files."""

from __future__ import annotations

from xformopt.program.dims import Dim, Dims, Shape, Size
from xformopt.program.interpret import infer_value, interpret
from xformopt.program.precision import convert_precision, numpy_interface, widened
from xformopt.program.program import Input, Level, Output, Program, path_of, shape_of, value_of
from xformopt.program.sample import example_sizes, sample_inputs, valid_positions
from xformopt.program.storage import load_program, save_program

__all__ = [
    "Dim",
    "Dims",
    "Input",
    "Level",
    "Output",
    "Program",
    "Shape",
    "Size",
    "convert_precision",
    "example_sizes",
    "infer_value",
    "interpret",
    "load_program",
    "numpy_interface",
    "path_of",
    "sample_inputs",
    "save_program",
    "shape_of",
    "valid_positions",
    "value_of",
    "widened",
]
