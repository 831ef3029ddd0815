"""An opened session as a benchmark asks for it; a bundle carries this file to machines that have no xformopt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from xformopt.measure.runner import OperatorTime

__all__ = ["ProfiledSession", "SessionRunner"]


class ProfiledSession(Protocol):
    """A model opened in a runtime that tells the time of its nodes."""

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        ...

    def profile(
        self, inputs: Mapping[str, np.ndarray], rounds: int, keep: Path | None = None
    ) -> tuple[list[OperatorTime], list[str]]:
        """Return the time of every node over ``rounds`` runs, and the nodes that ran elsewhere than asked."""
        ...


class SessionRunner:
    """A session, with what a benchmark records of its model.

    Args:
        target: What it was opened on.
        session: The opened model.
        model: Its file; files whose names begin with this one's belong to it.
        precision: Of its arithmetic.
        profile_to: A folder for the runtime's own profile.

    """

    def __init__(
        self, target: str, session: ProfiledSession, model: Path, precision: str, profile_to: Path | None = None
    ) -> None:
        self.target, self.precision = target, precision
        self._session, self._profile_to = session, profile_to
        self.input_names, self.output_names = session.input_names, session.output_names
        self.size_bytes = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
        self.fallbacks: list[str] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        return self._session.run(inputs)

    def profile(self, inputs: Mapping[str, np.ndarray], rounds: int) -> list[OperatorTime] | None:
        """Return the kernel time of every node over ``rounds`` runs, longest first."""
        times, self.fallbacks = self._session.profile(inputs, rounds, self._profile_to)
        return times
