"""Why ``torch.export`` failed, in one paragraph: the module, the line, and what to change."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path
from types import FrameType, TracebackType

import torch

__all__ = ["explain_export_failure"]

_TORCH = str(Path(torch.__file__).parent)
_ADVICE = (
    (
        r"data-dependent|GuardOnDataDependent|Could not guard|bool\(\) on|non-singleton|DataDependentOutput|"
        r"_local_scalar_dense|\.item\(\)|UserErrorType\.DYNAMIC_CONTROL_FLOW|unbacked",
        "A decision or size there depends on the values of a tensor, which a graph cannot hold. Compute it with tensor "
        "operations (torch.where, masks), or from shapes and configuration.",
    ),
    (
        r"Constraints violated|specialized|dynamic_shapes|constraint",
        "The code fixes a size that was asked to vary. Read sizes from the input's shape, or leave the dimension "
        "out of `dynamic`.",
    ),
    (
        r"numpy|np\.|not supported for FakeTensor|\.numpy\(\)",
        "The code leaves torch (numpy or Python values of tensors). Keep the computation in torch operations.",
    ),
    (
        r"unexpected keyword|missing \d+ required|positional argument|required positional|got multiple values",
        "The example inputs do not fit the forward's parameters. Pass a dict by parameter name.",
    ),
    (
        r"size of tensor|shapes cannot be multiplied|Expected size|must match|size mismatch|index out of range",
        "The example inputs do not fit the model: check their shapes, dtypes and value ranges.",
    ),
    (
        r"out of memory|can't allocate",
        "There is not enough memory to trace the model at the example sizes; use a smaller batch or length.",
    ),
)
_DEFAULT_ADVICE = "Rewrite that line with plain tensor operations, or capture a module that leaves it out."


def explain_export_failure(model: torch.nn.Module, error: BaseException) -> str:
    """Return one paragraph for an exception raised while ``model`` was run or exported."""
    cause = _root_cause(error)
    message = _first_sentence(str(cause)) or type(cause).__name__
    where = _where(model, cause) or _where(model, error) or f"in {type(model).__name__}"
    text = f"{type(cause).__name__} {cause}"
    advice = next((said for pattern, said in _ADVICE if re.search(pattern, text, re.IGNORECASE)), _DEFAULT_ADVICE)
    return f"{type(model).__name__} cannot be captured: {type(cause).__name__} {where}: {message} {advice}"


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    first = lines[0][:300]
    return first if first.endswith((".", "!", "?")) else first + "."


def _where(model: torch.nn.Module, error: BaseException) -> str:
    """Return 'in MODULE (Class) at FILE:LINE, `SOURCE`' for the innermost frame that is not torch's own."""
    frames = [frame for frame in _frames(error.__traceback__) if _is_users(frame[0])]
    if not frames:
        return ""
    frame, line = frames[-1]
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    # the line is the reader's own code or a library's: its last two parts are enough to find it
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    module = _module_of(model, [f for f, _ in frames])
    return f"in {module} at {file}:{line}" + (f", `{source}`" if source else "")


def _frames(trace: TracebackType | None) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(trace))


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    ours = "/xformopt/capture/" in file
    return not (file.startswith(_TORCH) or file.startswith("<") or ours or "contextlib" in file)


def _module_of(model: torch.nn.Module, frames: list[FrameType]) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and id(owner) in names:
            return f"{names[id(owner)] or 'the top module'} ({type(owner).__name__})"
    return type(model).__name__
