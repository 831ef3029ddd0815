"""The exception tree: every error a user can meet, and the exit status it means.

    XformoptError
     ├── UsageError            wrong usage: an unknown name, option or combination (exit status 2)
     ├── CaptureError          a model could not be turned into a Program
     ├── ProgramError          a Program is not well formed, or its text does not parse
     ├── PassError             a pass failed or left the Program invalid
     │    └── VerificationError    a pass changed what the Program computes
     ├── LoweringError         a target cannot express or run the Program
     ├── ArtifactError         an artifact directory is damaged, foreign, or not one
     ├── DataError             calibration data or inputs do not fit the Program
     ├── MeasurementError      a benchmark could not be run
     ├── OutputError           the output path exists, is not writable, or the disk is full
     └── MissingExtraError     an optional toolchain is not installed

A message is one paragraph: what is wrong, where, what was expected, what to do.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CaptureError",
    "DataError",
    "LoweringError",
    "MeasurementError",
    "MissingExtraError",
    "OutputError",
    "PassError",
    "ProgramError",
    "UsageError",
    "VerificationError",
    "XformoptError",
]


class XformoptError(Exception):
    """Root of everything xformopt raises on purpose; `str()` is the paragraph shown to the user."""

    exit_status = 1


class UsageError(XformoptError):
    """The request itself is wrong: an unknown name, option or combination."""

    exit_status = 2


class CaptureError(XformoptError):
    """A model could not be loaded or turned into a Program."""


class ProgramError(XformoptError):
    """A Program is not well formed, or its text does not parse."""


class PassError(XformoptError):
    """A pass failed or left the Program invalid."""


class VerificationError(PassError):
    """A pass changed what the Program computes beyond what it is allowed."""


class LoweringError(XformoptError):
    """A target cannot express or run the Program."""


class ArtifactError(XformoptError):
    """An artifact directory is damaged, made by another version, or not an artifact."""


class DataError(XformoptError):
    """Calibration data or inputs do not fit the Program."""


class MeasurementError(XformoptError):
    """A benchmark could not be run."""


class OutputError(XformoptError):
    """The output path exists, cannot be written, or the disk is full."""


class MissingExtraError(XformoptError):
    """An optional toolchain is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        super().__init__(
            f'{purpose} needs the package "{package}", which is not installed. '
            f'Install it with: pip install "xformopt[{extra}]"'
        )
