"""Next-byte prediction: the data is what it says, and the bits are counted right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from xformopt.errors import XformoptError
from xformopt.models.tasks import pycode
from xformopt.models.tasks.pycode import CONTEXT, HELD_OUT, PyCode, far_repeats, training_windows
from xformopt.models.tasks.task import Batch


def test_held_out_modules_are_not_trained_on() -> None:
    assert not set(HELD_OUT) & set(pycode._training_modules())
    assert list(HELD_OUT) == sorted(HELD_OUT)
    trained = bytes(pycode._training_bytes().numpy())
    assert b"class TextWrapper:" not in trained
    assert b"class OrderedDict(dict):" in trained
    assert len(trained) > 3_000_000


def test_the_test_split_is_fixed() -> None:
    batches = list(PyCode().test())
    windows = torch.cat([batch.inputs["input_ids"] for batch in batches])
    assert windows.shape == (256, CONTEXT)
    assert windows.min() >= 0
    assert windows.max() < pycode.VOCABULARY
    # another patch release of Python has other bytes, and then the committed figures are of another text
    if pycode.held_out_digest() == pycode.MEASURED_DIGEST:
        assert PyCode().baselines()["byte pairs"] == pytest.approx(3.4377, abs=1e-3)


def test_training_windows_follow_the_seed() -> None:
    first, again, other = (training_windows(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bits_of_predictions_that_are_known() -> None:
    task = PyCode()
    batch = next(task.test())
    ids = batch.inputs["input_ids"]
    uniform = torch.zeros(*ids.shape, pycode.VOCABULARY)
    items, weights = task.judge(uniform, batch)
    assert weights is None
    torch.testing.assert_close(items, torch.full((len(ids),), 8.0, dtype=torch.float64))
    # half of the probability on the right byte: one bit each
    knowing = torch.zeros(*ids.shape, pycode.VOCABULARY)
    knowing[:, :-1].scatter_(2, ids[:, 1:, None], math.log(pycode.VOCABULARY - 1))
    torch.testing.assert_close(task.judge(knowing, batch)[0], torch.ones(len(ids), dtype=torch.float64))


def test_far_repeats_by_their_definition() -> None:
    filler = bytes(range(128, 256))
    phrase = b"import os.path"
    found = far_repeats(phrase + filler + b"#" + phrase)
    start = len(phrase) + len(filler) + 1
    # the first eight bytes of a phrase have nothing of its own before them
    expected = [t >= start + 8 for t in range(1, start + len(phrase))]
    assert found == expected


def test_a_repeat_that_is_near_or_answers_wrongly_does_not_count() -> None:
    phrase = b"import os.path"
    assert not any(far_repeats(phrase + b"#" * 50 + phrase))
    filler = bytes(range(128, 256))
    near = phrase + filler + b"#" + phrase + b"!" + phrase
    assert not any(far_repeats(near)[-len(phrase) :])
    changed = far_repeats(phrase + filler + b"#" + b"import os.join")
    assert [t for t, far in enumerate(changed[-4:]) if far] == []


def test_far_repeats_are_scored_apart() -> None:
    task = PyCode()

    def copying(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Know exactly the far repeats, and nothing else."""
        ids = inputs["input_ids"]
        logits = torch.zeros(*ids.shape, pycode.VOCABULARY)
        far = torch.tensor([far_repeats(bytes(row)) for row in ids.tolist()])
        logits[:, :-1].scatter_(2, ids[:, 1:, None], far[..., None] * 50.0)
        return {"logits": logits}

    batches = list(task.test())[:2]
    score = _on(task, batches).evaluate(copying)
    assert score.details["bits per byte on far repeats"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < score.details["share of far repeats"] < 0.3
    assert score.value == pytest.approx(8 * (1 - score.details["share of far repeats"]), abs=1e-6)


def _on(task: PyCode, batches: list[Batch]) -> PyCode:
    """Return a task of the same kind over these batches alone."""

    class Few(PyCode):
        def test(self):  # type: ignore[no-untyped-def]
            yield from batches

    return Few(task.fold)


def test_a_library_without_source_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pycode, "_library", lambda: tmp_path)
    with pytest.raises(XformoptError, match=r"argparse\.py cannot be read"):
        pycode._read(HELD_OUT)
