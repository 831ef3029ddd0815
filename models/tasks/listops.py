"""Nested list operations: the answer of an expression such as ``[MAX 2 9 [MIN 4 7 ] 0 ]``.

Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv 1804.06028, in the form of Tay et
al., "Long Range Arena", arXiv 2011.04006: digits, maximum, minimum, median and sum modulo 10; lists of 2 to 10 entries
nested up to 10 deep, each entry a list with probability 1/4; the brackets that would make it a binary tree are left
out, as they are there.  Expressions have 8 to 512 tokens (there 500 to 2,000) and are drawn from a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import ClassVar, TypeAlias

import torch
from torch.nn import functional

from xformopt.models.tasks.classification import Classification
from xformopt.models.tasks.task import Batch

__all__ = [
    "CLOSE",
    "DEEPEST",
    "DIGITS",
    "FIRST_OPERATOR",
    "LONGEST",
    "SHORTEST",
    "VOCABULARY",
    "Expression",
    "ListOps",
    "draw",
    "encode",
    "pad",
    "written",
]

SHORTEST, LONGEST = 8, 512
DIGITS = 10
_PADDING, _FIRST_DIGIT = 0, 1
_NESTED = 0.25
DEEPEST, _MOST_ENTRIES = 10, 10
_TEST_ITEMS, _TEST_SEED, _TRAINING_SEED = 1000, 1, 2
_VALIDATION_ITEMS, _VALIDATION_SEED = 200, 3
_CALIBRATION_ITEMS = 64
_BAG_ITEMS = 4000
_BATCH = 20

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    # of an even number of entries, the mean of the middle two, cut off
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % DIGITS,
}
_NAMES = tuple(OPERATORS)
FIRST_OPERATOR = _FIRST_DIGIT + DIGITS
CLOSE = FIRST_OPERATOR + len(_NAMES)
VOCABULARY = CLOSE + 1

# a digit, or an operator's number and its entries
Tree: TypeAlias = "int | tuple[int, list[Tree]]"


@dataclass(frozen=True)
class Expression:
    """One expression.

    Attributes:
        tokens: Its token ids; the first is the outermost operator.
        values: Beside each token: the value of the list that it opens, or -1 where it opens none.

    """

    tokens: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def answer(self) -> int:
        """The value of the whole expression."""
        return self.values[0]


class _TooLongError(Exception):
    """The tree that is being drawn has more tokens than it may."""


def draw(source: random.Random, shortest: int = SHORTEST, longest: int = LONGEST) -> Expression:
    """Draw expressions until one has ``shortest`` to ``longest`` tokens, as the paper's generator does."""
    while True:
        room = [longest]
        try:
            expression = encode(_list(source, 1, room))
        except _TooLongError:
            continue
        if len(expression.tokens) >= shortest:
            return expression


def _list(source: random.Random, depth: int, room: list[int]) -> Tree:
    """Draw a list; ``room`` holds how many tokens are left, and stops a tree as soon as it grows too large."""
    count = source.randint(2, _MOST_ENTRIES)
    room[0] -= 2
    if room[0] < 0:
        raise _TooLongError
    return source.randrange(len(_NAMES)), [_entry(source, depth + 1, room) for _ in range(count)]


def _entry(source: random.Random, depth: int, room: list[int]) -> Tree:
    if depth < DEEPEST and source.random() < _NESTED:
        return _list(source, depth, room)
    room[0] -= 1
    if room[0] < 0:
        raise _TooLongError
    return source.randrange(DIGITS)


def encode(tree: Tree) -> Expression:
    """Write a tree out, and evaluate every list in it."""
    if isinstance(tree, int):
        return Expression((_FIRST_DIGIT + tree,), (-1,))
    operator, entries = tree
    parts = [encode(entry) for entry in entries]
    arguments = [entry if isinstance(entry, int) else part.answer for entry, part in zip(entries, parts, strict=True)]
    return Expression(
        (FIRST_OPERATOR + operator, *(token for part in parts for token in part.tokens), CLOSE),
        (OPERATORS[_NAMES[operator]](arguments), *(value for part in parts for value in part.values), -1),
    )


def written(tokens: tuple[int, ...]) -> str:
    """Return the expression as text."""
    names = ("", *map(str, range(DIGITS)), *_NAMES, "]")
    return " ".join(names[token] for token in tokens if token != _PADDING)


def pad(expressions: list[Expression]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return model inputs ``[B, T]``, padded on the right, and the values beside them, -1 where there is none."""
    length = max(len(expression.tokens) for expression in expressions)
    ids = torch.full((len(expressions), length), _PADDING)
    values = torch.full((len(expressions), length), -1)
    for row, expression in enumerate(expressions):
        ids[row, : len(expression.tokens)] = torch.tensor(expression.tokens)
        values[row, : len(expression.values)] = torch.tensor(expression.values)
    return {"input_ids": ids, "attention_mask": (ids != _PADDING).long()}, values


@cache
def _drawn(seed: int, count: int) -> tuple[Expression, ...]:
    source = random.Random(seed)
    return tuple(draw(source) for _ in range(count))


@dataclass(frozen=True)
class ListOps(Classification):
    """Accuracy of a bidirectional encoder that answers nested list operations."""

    name: ClassVar[str] = "listops"
    summary: ClassVar[str] = "nested list operations of 8 to 512 tokens, ten answers (Long Range Arena)"
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return expressions of another seed than the test split's."""
        return [pad(part)[0] for part in _by_length(_drawn(_TRAINING_SEED, self.samples or _CALIBRATION_ITEMS))]

    def test(self) -> Iterator[Batch]:
        """Yield 1,000 expressions, the shortest first, so that a batch is padded little."""
        return _batches(_drawn(_TEST_SEED, _TEST_ITEMS))

    def validation(self) -> Iterator[Batch]:
        """Yield 200 expressions of a seed of their own."""
        return _batches(_drawn(_VALIDATION_SEED, _VALIDATION_ITEMS))

    def baselines(self) -> dict[str, float]:
        """Return what the commonest answer, the token counts, and the outermost operator's commonest answer reach.

        The first and the last are the best of their kind: their answers are the test split's own commonest ones.
        """
        tested = _drawn(_TEST_SEED, _TEST_ITEMS)
        by_root = [Counter(e.answer for e in tested if e.tokens[0] == FIRST_OPERATOR + i) for i in range(len(_NAMES))]
        return {
            "commonest answer": max(Counter(e.answer for e in tested).values()) / len(tested),
            "bag of tokens": _bag_of_tokens(_drawn(_TRAINING_SEED, _BAG_ITEMS), tested),
            "commonest answer of the outermost operator": sum(max(c.values(), default=0) for c in by_root)
            / len(tested),
        }


def _batches(expressions: tuple[Expression, ...]) -> Iterator[Batch]:
    for part in _by_length(expressions):
        inputs, values = pad(part)
        yield Batch(inputs, {"label": values[:, 0]})


def _by_length(expressions: tuple[Expression, ...]) -> list[list[Expression]]:
    """Return batches of expressions of about one length."""
    ordered = sorted(expressions, key=lambda expression: len(expression.tokens))
    return [ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH)]


def _bag_of_tokens(trained: tuple[Expression, ...], tested: tuple[Expression, ...]) -> float:
    """Return the accuracy on ``tested`` of logistic regression on the share of each token, fitted on ``trained``."""
    shares, answers = _shares(trained)
    mean, deviation = shares.mean(0), shares.std(0) + 1e-6
    weights = torch.zeros(shares.shape[1] + 1, DIGITS, dtype=torch.float64, requires_grad=True)
    inputs = torch.cat([(shares - mean) / deviation, torch.ones(len(shares), 1)], 1)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def penalized() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weights, answers) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(penalized)
    shares, answers = _shares(tested)
    inputs = torch.cat([(shares - mean) / deviation, torch.ones(len(shares), 1)], 1)
    return float(((inputs @ weights.detach()).argmax(1) == answers).double().mean())


def _shares(expressions: tuple[Expression, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the share of each token in each expression ``[N, VOCABULARY]``, float64, and the answers ``[N]``."""
    counts = [torch.bincount(torch.tensor(e.tokens), minlength=VOCABULARY) for e in expressions]
    shares = torch.stack(counts).double()
    return shares / shares.sum(1, keepdim=True), torch.tensor([e.answer for e in expressions])
