"""A model trained to evaluate nested lists, and how it was trained."""

from __future__ import annotations

import random

import torch
from torch import nn

from xformopt.models.blocks import draw_weights
from xformopt.models.examples import example_mask, example_tokens
from xformopt.models.t5 import Encoder, T5Config
from xformopt.models.tasks.listops import (
    CLOSE,
    DEEPEST,
    DIGITS,
    FIRST_OPERATOR,
    LONGEST,
    VOCABULARY,
    Expression,
    draw,
    pad,
)
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

__all__ = ["TRAINED", "ListEncoder"]

_SCHEDULE = Schedule(steps=3000, rate=3e-3, warmup=0.02, betas=(0.9, 0.95), muon=True, cooldown=0.4, bfloat16=True)
# until which share of the steps expressions may have so many tokens: at first hardly a list has another inside
_LESSONS = ((0.1, 16), (0.25, 64), (1.0, LONGEST))
_SHORTEST = 4
_POOL, _TOKENS = 400, 2048
_EXAMPLE_LENGTH = 16


class ListEncoder(nn.Module):
    """T5's encoder, whose biases know only distances, over tokens that know how deep they are nested.

    Depth is a position in the tree (Shiv & Quirk, "Novel positional encodings to enable tree-based transformers",
    NeurIPS 2019); the encoder counts it from the brackets.  Without it, so small a model learns in minutes to answer
    from the outermost operator and nearby digits alone (accuracy 0.39).  The outermost operator comes first, so the
    answer of an expression is read off the first token.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.levels = nn.Embedding(DEEPEST + 1, config.width)
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.width, DIGITS)
        draw_weights(self, config.width**-0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``{"logits": [B, 10]}`` from tokens and their mask ``[B, T]``, 0 on padding."""
        return {"logits": self.head(self._hidden(input_ids, attention_mask)[:, 0])}

    def every_value(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, T, 10]`` of the value of the list that each token opens; only operators open one."""
        logits: torch.Tensor = self.head(self._hidden(input_ids, attention_mask))
        return logits

    def _hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        embedded = self.tokens(input_ids) + self.levels(_depth(input_ids))  # [B, T, C]
        hidden: torch.Tensor = self.encoder(embedded, attention_mask)
        return hidden

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Return two short expressions, one of them padded."""
        ids = example_tokens(VOCABULARY, _EXAMPLE_LENGTH)
        return {"input_ids": ids, "attention_mask": example_mask(_EXAMPLE_LENGTH)}


def _depth(ids: torch.Tensor) -> torch.Tensor:
    """Return in how many lists each token lies, ``[B, T]``; brackets lie in their own, padding in none.

    Tokens that are no expression have depths, too: as far as there are levels.
    """
    closes = (ids == CLOSE).long()
    opens = ((ids >= FIRST_OPERATOR) & (ids < CLOSE)).long()
    return ((opens - closes).cumsum(1) + closes).clamp(0, DEEPEST)


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
            "Shiv & Quirk, Novel positional encodings to enable tree-based transformers, NeurIPS 2019",
            "Raffel et al. 2019, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, "
            "arXiv 1910.10683",
            "Tay et al. 2020, Long Range Arena: A Benchmark for Efficient Transformers, arXiv 2011.04006",
        ),
        summary="T5's encoder of 6 layers over tokens and their depth, trained to evaluate nested lists",
        tolerance=0.02,
    ),
)
