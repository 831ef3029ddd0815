"""Attention in torch's own modules, and queries that are parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


class Torch(nn.Module):
    """``nn.MultiheadAttention`` in its forms."""

    def __init__(self, batch_first: bool, weights: bool, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **sizes)
        self.weights = weights

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x, key_padding_mask=padding, need_weights=self.weights)[0]
        return found


@pytest.mark.parametrize("weights", [False, True], ids=["sdpa", "weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
def test_multihead_attention(batch_first: bool, weights: bool, lift: Any) -> None:
    model, x = Torch(batch_first, weights), torch.randn(2, 9, 32)
    if batch_first:
        lifted = lift(model, x=x, padding=torch.arange(9).expand(2, 9) > 6)
        assert lifted.operand("xf.attention", "key_mask") is not None
    else:
        lifted = lift(model, {"x": {0: "length", 1: "batch"}}, x=x.transpose(0, 1))
        lifted.check({"x": torch.randn(5, 3, 32)})
    assert lifted.operators["xf.attention"] == 1


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool, lift: Any) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, activation="gelu", norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    lifted = lift(model, src=torch.randn(2, 9, 32), src_key_padding_mask=torch.arange(9).expand(2, 9) > 6)
    assert lifted.operators["xf.attention"] == 2
    assert lifted.operators["xf.activation"] == 2
    assert lifted.operand("xf.attention", "key_mask") is not None


def test_transformer_decoder(lift: Any) -> None:
    layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
            found: torch.Tensor = self.layer(x, memory, tgt_mask=mask)
            return found

    lifted = lift(Decoder(), x=torch.randn(2, 9, 32), memory=torch.randn(2, 5, 32))
    assert lifted.operators["xf.attention"] == 2
    assert [lifted.attributes("xf.attention", i)["causal"] for i in (0, 1)] == [True, False]


class Latents(nn.Module):
    """Learned queries shared by the batch (Perceiver, Q-Former)."""

    def __init__(self, spread: bool) -> None:
        super().__init__()
        self.latents, self.q, self.kv = nn.Parameter(torch.randn(1, 6, 32)), nn.Linear(32, 32), nn.Linear(32, 64)
        self.spread = spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(self.latents)
        q = (q.expand(x.shape[0], -1, -1) if self.spread else q).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("spread", [True, False])
def test_learned_queries_keep_their_heads(spread: bool, lift: Any) -> None:
    lifted = lift(Latents(spread), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == spread
    if spread:
        assert lifted.attributes("xf.attention")["heads"] == 4
    for batch in (1, 3, 5):
        lifted.check({"x": torch.randn(batch, 4, 32)})
