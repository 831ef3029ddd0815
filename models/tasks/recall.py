"""Multi-query associative recall: a causal model sees keys with their values, and later must give the value of each.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927: the sequence
opens with distinct keys, each followed by its value; afterwards every key appears once more, and right there the model
must name its value.  The paper draws the gap before a key's second appearance from a power law, and zeros stand between
the queries; here a query is drawn evenly from the last quarter of the sequence and tokens of their own kind stand
between, so that every answer lies more than half a sequence back and no short attention window reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from xformopt.models.tasks.task import Batch, Task

__all__ = ["LENGTHS", "VOCABULARY", "Recall", "draw", "pairs_of"]

LENGTHS = (256, 512, 1024, 2048)
KEYS, VALUES, FILLERS = 128, 128, 64
_FIRST_VALUE, _FIRST_FILLER = KEYS, KEYS + VALUES
VOCABULARY = KEYS + VALUES + FILLERS
_TOKENS_PER_PAIR = 32
_TEST_TOKENS = 4096
_TEST_BATCHES, _VALIDATION_BATCHES = 8, 1
_TEST_SEED, _CALIBRATION_SEED, _VALIDATION_SEED = 1, 2, 3
NOT_ASKED = -1


def pairs_of(length: int) -> int:
    """Return how many pairs a sequence of this length opens with: one per 32 tokens."""
    return length // _TOKENS_PER_PAIR


def draw(
    count: int, length: int, generator: torch.Generator, pairs: int | None = None, asked_from: float = 0.75
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw sequences and their answers.

    Args:
        count: Sequences, B.
        length: Tokens of each, T.
        generator: What they are drawn from.
        pairs: Pairs of key and value; None: one per 32 tokens.
        asked_from: Where in the sequence the queries may begin, as a share of the length.

    Returns:
        Token ids and answers, ``[B, T]`` int64; an answer is the value's token where a key is asked, else -1.

    """
    pairs = pairs_of(length) if pairs is None else pairs
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(_FIRST_VALUE, _FIRST_VALUE + VALUES, (count, pairs), generator=generator)
    ids = torch.randint(_FIRST_FILLER, _FIRST_FILLER + FILLERS, (count, length), generator=generator)
    ids[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    first = max(int(length * asked_from), 2 * pairs)
    places = first + torch.rand(count, length - first, generator=generator).argsort(1)[:, :pairs]
    answers = torch.full_like(ids, NOT_ASKED)
    return ids.scatter(1, places, keys), answers.scatter(1, places, values)


@dataclass(frozen=True)
class Recall(Task):
    """Share of the queries that a causal model answers with the right value, over lengths of 256 to 2,048 tokens.

    An item is a query; the lengths have equally many tokens and so equally many queries.
    """

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "multi-query associative recall over 256 to 2,048 tokens"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("input_ids",)
    output: ClassVar[str] = "logits"

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return sequences of another seed than the test split's, some of each length."""
        generator = torch.Generator().manual_seed(_CALIBRATION_SEED)
        rounds = math.ceil((self.samples or 1) / sum(_TEST_TOKENS // length for length in LENGTHS))
        lengths = [length for _ in range(rounds) for length in LENGTHS]
        return [{"input_ids": draw(_TEST_TOKENS // length, length, generator)[0]} for length in lengths]

    def test(self) -> Iterator[Batch]:
        """Yield sequences of each length, the short ones first."""
        return _batches(_TEST_BATCHES, _TEST_SEED)

    def validation(self) -> Iterator[Batch]:
        """Yield sequences of a seed of their own, fewer of each length."""
        return _batches(_VALIDATION_BATCHES, _VALIDATION_SEED)

    def judge(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return 1 for each query whose largest logit is its value's, else 0, row by row."""
        answers = batch.targets["answers"]
        asked = answers != NOT_ASKED
        return (output[asked].argmax(1) == answers[asked]).double(), None

    def baselines(self) -> dict[str, float]:
        """Return what is reached by guessing, and by giving one of the sequence's own values whatever the key."""
        shares = [pairs_of(length) for length in LENGTHS]
        return {"guess": 1 / VALUES, "any value of the sequence": sum(1 / pairs for pairs in shares) / len(shares)}


def _batches(count: int, seed: int) -> Iterator[Batch]:
    """Yield so many batches of each length."""
    generator = torch.Generator().manual_seed(seed)
    for length in LENGTHS:
        for _ in range(count):
            ids, answers = draw(_TEST_TOKENS // length, length, generator)
            yield Batch({"input_ids": ids}, {"answers": answers})
