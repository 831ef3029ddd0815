"""A model trained to evaluate nested lists, and how it was trained."""

from __future__ import annotations

import random

import torch
from torch import nn

from xformopt.models.examples import example_mask, example_tokens
from xformopt.models.t5 import T5Config, T5Encoder
from xformopt.models.tasks.listops import DIGITS, LONGEST, VOCABULARY, Expression, draw, pad
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

__all__ = ["TRAINED", "ListEncoder"]

_SCHEDULE = Schedule(steps=8000, rate=6e-3, warmup=0.02, betas=(0.9, 0.95), muon=True, cooldown=0.4, bfloat16=True)
# until which share of the steps expressions may have so many tokens: at first hardly a list has another inside
_LESSONS = ((0.25, 16), (0.5, 48), (0.75, 192), (1.0, LONGEST))
_SHORTEST = 4
_POOL, _TOKENS = 400, 1024
_EXAMPLE_LENGTH = 16


class ListEncoder(nn.Module):
    """T5's encoder, whose biases know only distances, and one linear layer that reads a list's value off its operator.

    The outermost operator comes first, so the answer of an expression is read off the first token.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = T5Encoder(config)
        self.head = nn.Linear(config.width, DIGITS)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``{"logits": [B, 10]}`` from tokens and their mask ``[B, T]``, 0 on padding."""
        hidden = self.encoder(input_ids, attention_mask)["hidden"]  # [B, T, C]
        return {"logits": self.head(hidden[:, 0])}

    def every_value(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, T, 10]`` of the value of the list that each token opens; only operators open one."""
        logits: torch.Tensor = self.head(self.encoder(input_ids, attention_mask)["hidden"])
        return logits

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Return two short expressions, one of them padded."""
        ids = example_tokens(VOCABULARY, _EXAMPLE_LENGTH)
        return {"input_ids": ids, "attention_mask": example_mask(_EXAMPLE_LENGTH)}


def _model() -> nn.Module:
    return ListEncoder(
        T5Config(vocabulary=VOCABULARY, width=96, depth=6, heads=4, head_width=24, hidden=192, farthest=256)
    )


def _train(module: nn.Module, fold: int, progress: Progress) -> None:
    """Cross-entropy of the value of every list inside an expression, from short expressions to long ones."""
    source = random.Random(_SCHEDULE.seed)
    batches: list[list[Expression]] = []

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        if not batches:
            longest = next(longest for until, longest in _LESSONS if done < until)
            batches.extend(_batches([draw(source, _SHORTEST, longest) for _ in range(_POOL)]))
            source.shuffle(batches)
        inputs, values = pad(batches.pop())
        logits = module.every_value(**inputs)  # type: ignore[operator]
        opens = values >= 0
        return nn.functional.cross_entropy(logits[opens].float(), values[opens])

    fit(module, loss, _SCHEDULE, progress)


def _batches(expressions: list[Expression]) -> list[list[Expression]]:
    """Put expressions of about one length together, so many that a batch has at most ``_TOKENS`` with its padding."""
    batches: list[list[Expression]] = []
    for expression in sorted(expressions, key=lambda expression: len(expression.tokens)):
        if batches and (len(batches[-1]) + 1) * len(expression.tokens) <= _TOKENS:
            batches[-1].append(expression)
        else:
            batches.append([expression])
    return batches


TRAINED = (
    Trained(
        name="listops-t5",
        task="listops",
        module=_model,
        train=_train,
        sources=(
            "Raffel et al. 2019, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, "
            "arXiv 1910.10683",
            "Tay et al. 2020, Long Range Arena: A Benchmark for Efficient Transformers, arXiv 2011.04006",
        ),
        summary="T5's encoder of 6 layers, trained to evaluate nested lists",
        released=False,
    ),
)
