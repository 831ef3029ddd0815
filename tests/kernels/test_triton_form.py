"""Triton kernels as torch operators: the schemas of the dialect, and whole in exported programs."""

from __future__ import annotations

import pytest
import torch
from interpreted import randn, relative

from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.triton_form import load_kernels, power_of_two, rows_of, tiles


@pytest.mark.parametrize("name", sorted(load_kernels()))
def test_a_kernel_has_the_schema_of_its_operator(name: str) -> None:
    # torch reads every integer of a signature as one that may be symbolic
    ours = str(getattr(torch.ops.xf_triton, name).default._schema).replace("SymInt", "int")
    assert ours == str(load_operators()[name].overload._schema).replace("xf::", "xf_triton::")


class Layer(torch.nn.Module):
    def __init__(self, dialect: object) -> None:
        super().__init__()
        self.dialect = dialect
        self.weight = torch.nn.Parameter(randn(32))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        attended = self.dialect.attention(x, x, x, keep, heads=2, kv_heads=2, scale=0.25)
        normalized, _ = self.dialect.add_layer_norm(attended, x, self.weight, eps=1e-5)
        return self.dialect.activation(normalized, function="gelu")


def test_an_exported_program_holds_the_kernels_at_any_length() -> None:
    load_kernels()
    x, keep = randn(2, 21, 32), torch.ones(2, 21, dtype=torch.bool)
    length = torch.export.Dim("length", max=512)
    dynamic = {"x": {1: length}, "keep": {1: length}}
    program = torch.export.export(Layer(torch.ops.xf_triton), (x, keep), dynamic_shapes=dynamic)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"xf_triton.attention.default", "xf_triton.add_layer_norm.default"} <= called
    longer, keeps = randn(2, 40, 32), torch.arange(40) < torch.tensor([[40], [7]])
    with torch.no_grad():
        assert relative(program.module()(longer, keeps), Layer(xf)(longer, keeps)) < 1e-5


def test_sizes() -> None:
    assert [power_of_two(n) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert power_of_two(5, 1) == 8
    assert [tiles(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_rows_are_views_where_they_can_be() -> None:
    x = randn(2, 3, 24)
    assert rows_of(x[..., 8:16], 8).data.data_ptr() == x[..., 8:16].data_ptr()
    assert rows_of(x.mT, 3).data.stride(1) == 1
    assert rows_of(x, x.shape[-1]).data is x
