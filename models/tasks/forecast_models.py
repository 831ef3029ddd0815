"""A model trained on the generated series, and how it was trained."""

from __future__ import annotations

import torch
from torch import nn

from xformopt.models.patchtst import PatchTst, PatchTstConfig
from xformopt.models.tasks.forecast import HISTORY, HORIZON, VARIABLES, training_windows
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

__all__ = ["TRAINED"]

_BATCH = 16
_SCHEDULE = Schedule(steps=600, rate=2e-3, warmup=0.1, bfloat16=True)


def _patchtst() -> nn.Module:
    return PatchTst(
        PatchTstConfig(
            length=HISTORY,
            horizon=HORIZON,
            variables=VARIABLES,
            patch=24,
            stride=12,
            width=64,
            depth=3,
            heads=4,
            hidden=128,
        )
    )


def _train(module: nn.Module, fold: int, progress: Progress) -> None:
    """Squared error over the horizon, on windows drawn from the training part."""

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        histories, futures = training_windows(_BATCH, generator)
        return nn.functional.mse_loss(module(histories)["forecast"].float(), futures)

    fit(module, loss, _SCHEDULE, progress)


TRAINED = (
    Trained(
        name="forecast-patchtst",
        task="forecast",
        module=_patchtst,
        train=_train,
        sources=("Nie et al. 2022, A Time Series is Worth 64 Words, arXiv 2211.14730",),
        summary="PatchTST of 3 layers, trained on eight generated series",
        tolerance=0.01,
    ),
)
