"""Associative recall: every query has one answer, far away, and nothing else gives it away."""

from __future__ import annotations

import pytest
import torch

from xformopt.models.tasks import recall
from xformopt.models.tasks.recall import LENGTHS, Recall, draw, pairs_of
from xformopt.models.tasks.task import Run, Tensors


@pytest.mark.parametrize("length", LENGTHS)
def test_every_key_is_asked_once_and_far_from_its_value(length: int) -> None:
    ids, answers = draw(3, length, torch.Generator().manual_seed(0))
    pairs = pairs_of(length)
    for row, wanted in zip(ids, answers, strict=True):
        keys, values = row[: 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == pairs
        asked = (wanted != recall.NOT_ASKED).nonzero().squeeze(1)
        assert sorted(row[asked].tolist()) == sorted(keys)
        assert asked.min() >= 0.75 * length
        assert int(asked.min()) - 2 * pairs > length // 2
        given = dict(zip(keys, values, strict=True))
        assert [given[key] for key in row[asked].tolist()] == wanted[asked].tolist()
        # between the pairs and the queries, and between queries, there is neither key nor value
        rest = row.clone()
        rest[asked] = recall.VOCABULARY - 1
        assert rest[2 * pairs :].min() >= recall.KEYS + recall.VALUES


def test_a_lookup_solves_it_and_a_window_does_not() -> None:
    def lookup(window: int) -> Run:
        def run(inputs: Tensors) -> Tensors:
            ids = inputs["input_ids"]
            logits = torch.zeros(*ids.shape, recall.VOCABULARY)
            for row, tokens in enumerate(ids.tolist()):
                seen: dict[int, int] = {}
                for place, token in enumerate(tokens):
                    if token >= recall.KEYS:
                        continue
                    if place - seen.get(token, -window) < window:
                        logits[row, place, tokens[seen[token] + 1]] = 1
                    seen[token] = place
            return {"logits": logits}

        return run

    task = Recall()
    score = task.evaluate(lookup(window=4096))
    assert score.value == 1.0
    assert score.count == 4096
    assert task.evaluate(lookup(window=126)).value < 0.02


def test_seeds() -> None:
    first, again, other = (draw(2, 64, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [batch["input_ids"].shape[1] for batch in Recall().calibration()] == list(LENGTHS)
