"""Nested list operations: the generator writes what it evaluates."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from xformopt.models.tasks import listops
from xformopt.models.tasks.listops import ListOps, draw, encode, pad, written


def answer(text: str) -> int:
    """Evaluate an expression from its text, independently of the generator's tree."""
    stack: list[tuple[str, list[int]]] = [("", [])]
    for token in text.split():
        if token.startswith("["):
            stack.append((token[1:], []))
        elif token == "]":
            name, values = stack.pop()
            result = {
                "MAX": max(values),
                "MIN": min(values),
                "MED": int(statistics.median(values)),
                "SM": sum(values) % 10,
            }[name]
            stack[-1][1].append(result)
        else:
            stack[-1][1].append(int(token))
    (result,) = stack[0][1]
    return result


def test_answers_agree_with_the_text() -> None:
    source = random.Random(0)
    for _ in range(40):
        expression = draw(source, 10, 200)
        assert answer(written(expression.tokens)) == expression.answer


def test_the_value_of_every_list_stands_at_its_operator() -> None:
    # [MAX 2 [MED 9 4 ] [SM 8 7 ] ]
    expression = encode((0, [2, (2, [9, 4]), (3, [8, 7])]))
    assert written(expression.tokens) == "[MAX 2 [MED 9 4 ] [SM 8 7 ] ]"
    assert expression.values == (6, -1, 6, -1, -1, -1, 5, -1, -1, -1, -1)


def test_lengths_and_seeds() -> None:
    drawn = [draw(random.Random(seed), 64, 128) for seed in (1, 1, 2)]
    assert all(64 <= len(expression.tokens) <= 128 for expression in drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_padding() -> None:
    short, long = encode((0, [1, 2])), encode((1, [3, (2, [4, 5])]))
    inputs, values = pad([short, long])
    assert inputs["input_ids"].shape == values.shape == (2, 7)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 7]
    assert values[:, 0].tolist() == [2, 3]
    assert values[0, 4:].tolist() == [-1, -1, -1]
    assert int(inputs["input_ids"].max()) < listops.VOCABULARY


def test_task_is_scored_by_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listops, "_TEST_ITEMS", 60)
    monkeypatch.setattr(listops, "_BAG_ITEMS", 60)
    task = ListOps()
    answers = {
        tuple(row): label
        for batch in task.test()
        for row, label in zip(batch.inputs["input_ids"].tolist(), batch.targets["label"].tolist(), strict=True)
    }

    def knowing(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([answers[tuple(row)] for row in inputs["input_ids"].tolist()])
        return {"logits": torch.nn.functional.one_hot(labels, 10).float()}

    assert task.evaluate(knowing).value == 1.0
    assert task.evaluate(knowing).count == 60
    baselines = task.baselines()
    assert baselines["commonest answer"] < baselines["commonest answer of the outermost operator"] < 0.6
    assert 0.1 < baselines["bag of tokens"] < 0.6
