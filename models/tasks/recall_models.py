"""A model that solves associative recall, one that cannot for want of reach, and how both were trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from xformopt.models.llama import Llama, LlamaConfig
from xformopt.models.tasks.recall import LENGTHS, NOT_ASKED, VOCABULARY, draw
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

__all__ = ["TRAINED", "WINDOW"]

# two layers reach back twice as far, less than half of the shortest sequence
WINDOW = 64
_SCHEDULE = Schedule(steps=2000, rate=1e-2, warmup=0.025, betas=(0.9, 0.95), muon=True, cooldown=0.4, bfloat16=True)
# until which share of the steps: sequences, their length, pairs, where queries may begin
_LESSONS = ((0.25, 96, 16, 4, 0.5), (0.45, 48, 48, 12, 0.5), (0.65, 24, 128, 32, 0.5))
_TOKENS = 2048


def _model(window: int | None) -> nn.Module:
    return Llama(
        LlamaConfig(
            vocabulary=VOCABULARY,
            length=max(LENGTHS),
            width=64,
            depth=2,
            heads=2,
            kv_heads=2,
            hidden=128,
            window=window,
            tied=False,
        )
    )


def _train(module: nn.Module, fold: int, progress: Progress, steps: int | None = None) -> None:
    """Cross-entropy at the queries; from short sequences with few pairs to the task's own lengths."""

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        ids, answers = _lesson(generator, done)
        asked = answers != NOT_ASKED
        return nn.functional.cross_entropy(module(ids)["logits"][asked].float(), answers[asked])

    fit(module, loss, replace(_SCHEDULE, steps=steps or _SCHEDULE.steps), progress)


def _lesson(generator: torch.Generator, done: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw what is learned after a share of the steps."""
    for until, count, length, pairs, asked_from in _LESSONS:
        if done < until:
            return draw(count, length, generator, pairs, asked_from)
    length = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
    # half of them with queries early, so that every distance is seen
    asked_from = 0.3 if torch.rand((), generator=generator) < 0.5 else 0.75
    return draw(_TOKENS // length, length, generator, asked_from=asked_from)


_ZOOLOGY = "Arora et al. 2023, Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927"
_LLAMA = "Touvron et al. 2023, LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971"
_MISTRAL = "Jiang et al. 2023, Mistral 7B, arXiv 2310.06825"

TRAINED = (
    Trained(
        name="recall-llama",
        task="recall",
        module=partial(_model, None),
        train=_train,
        sources=(_ZOOLOGY, _LLAMA),
        summary="Llama of 2 layers, trained on associative recall",
        tolerance=0.02,
    ),
    Trained(
        name="recall-window",
        task="recall",
        module=partial(_model, WINDOW),
        # it has learned what it can: nothing within its reach tells the answers of the last lessons
        train=partial(_train, steps=500),
        sources=(_ZOOLOGY, _MISTRAL),
        summary="the same with a sliding window of 64 tokens, which has to fail beyond its reach",
        tolerance=0.02,
    ),
)
