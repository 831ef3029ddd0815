"""The zoo's recurrent models for a GPU: the operator that makes each what it is has its kernel."""

from __future__ import annotations

import pytest
import torch
from interpreted import relative

import xformopt as xo
from xformopt.lowering.triton_export import export_kernels
from xformopt.models.zoo import find_architecture

FAMILIES = {
    "deltanet-small": "delta_rule",
    "gla-small": "gated_linear_attention",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_its_kernel_and_computes_the_model(name: str) -> None:
    model = find_architecture(name).build()
    program = xo.capture(model, model.example_inputs(), {"input_ids": {0: "batch", 1: ("length", 1, 160)}})
    lifted = xo.Pipeline(()).run(program).program
    ready = export_kernels(lifted, device="cpu")
    assert ready.forms[FAMILIES[name]] == {"kernel": 4}
    assert not ready.refused
    ids = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        (found,) = ready.exported.module()(ids)
        assert relative(found, model(ids)["logits"]) < 1e-5
