"""The zoo's recurrent language models: causal, captured, optimized exactly, and the same on ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xformopt as xo
from xformopt.models.zoo import find_architecture

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# name, and the operator that makes it what it is
MODELS = {
    "deltanet-small": "xf.delta_rule",
    "gla-small": "xf.gated_linear_attention",
    "mamba-small": "xf.selective_scan",
    "mamba2-small": "xf.ssd",
    "retnet-small": "xf.retention",
    "rwkv4-small": "xf.rwkv",
}
# of those, what the default tier lowers
QUICK = ("deltanet-small", "mamba2-small")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_runs_on_onnx_runtime_as_in_eager_mode(name: str) -> None:
    architecture = find_architecture(name)
    model = architecture.build()
    # longer ones would only take longer to verify
    program = xo.capture(model, model.example_inputs(), {"input_ids": {0: "batch", 1: ("length", 1, 160)}})
    result = xo.Pipeline.recipe("exact").run(program, target="ort-cpu")
    printed = str(result.program)
    assert MODELS[name] in printed
    assert not [record for record in result.history if record.dropped]
    artifact = xo.lower(result.program, target="ort-cpu", measure=False)
    for batch, length in ((1, 1), (2, 9), (1, 150)):
        ids = torch.randint(0, 512, (batch, length))
        with torch.no_grad():
            want = model(ids)["logits"].numpy()
        have = artifact.run(input_ids=ids.numpy())["logits"]
        assert np.linalg.norm(have - want) / np.linalg.norm(want) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_token_sees_none_after_it(name: str) -> None:
    model = find_architecture(name).build()
    ids = torch.randint(0, 512, (1, 80))
    other = ids.clone()
    other[:, 70:] = (other[:, 70:] + 1) % 512
    with torch.no_grad():
        one, two = model(ids)["logits"], model(other)["logits"]
    torch.testing.assert_close(one[:, :70], two[:, :70], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[:, 70:], two[:, 70:])


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small_and_its_weights_come_from_the_seed(name: str) -> None:
    architecture = find_architecture(name)
    one, two = architecture.build(), architecture.build()
    assert 100_000 < sum(weight.numel() for weight in one.parameters()) < 5_000_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
