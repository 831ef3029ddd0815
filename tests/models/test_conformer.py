"""A Conformer that streams computes what it does on the whole recording."""

from __future__ import annotations

import pytest
import torch

from xformopt.models.conformer import Conformer, ConformerConfig


@pytest.mark.parametrize(("chunk", "memory"), [(8, 16), (4, 4), (2, 12)])
def test_stream_equals_forward(chunk: int, memory: int) -> None:
    model = Conformer(ConformerConfig(depth=2, chunk=chunk, memory=memory)).eval().requires_grad_(False)
    features = model.example_inputs()["features"]
    state, streamed = model.initial_state(len(features)), []
    for part in features.split(4 * chunk, 1):
        outputs, after = model.stream(part, state)
        streamed.append(outputs["logits"])
        assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in state.items()}
        state = after
    assert int(state["seen"]) == features.shape[1] // 4
    torch.testing.assert_close(torch.cat(streamed, 1), model(features)["logits"], rtol=1e-5, atol=1e-5)


def test_what_lies_ahead_of_the_chunk_changes_nothing() -> None:
    model = Conformer(ConformerConfig(depth=1, chunk=4)).eval().requires_grad_(False)
    features = model.example_inputs()["features"]
    changed = features.clone()
    changed[:, 4 * 8 :] = 5.0
    one, other = model(features)["logits"], model(changed)["logits"]
    assert torch.equal(one[:, :8], other[:, :8])
    assert not torch.equal(one[:, 8:], other[:, 8:])
