"""What looks like attention or like a mask and is not: it computes the same, and says why where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

Function = Callable[..., torch.Tensor]


class Heads(nn.Module):
    """Queries, keys and values of four heads, attended to by a function."""

    def __init__(self, attend: Function) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.slopes = nn.Parameter(torch.rand(4) + 0.5)
        self.sink = nn.Parameter(torch.randn(4))
        self.attend = attend

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.attend(self, q, k, v, *(() if mask is None else (mask,)))


def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT * 8**-0.5


def dropped(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=1e-7)


def weights_dropped(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.dropout(logits(q, k).softmax(-1), 1e-7, training=True) @ v


def wrong_axis(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k).softmax(-2) @ v


def over_heads(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k).softmax(1) @ v


def softcap(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(logits(q, k) / 5) * 5).softmax(-1) @ v


def squared(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k).square().softmax(-1) @ v


def factor_of_heads(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (logits(q, k) * m.slopes[:, None, None]).softmax(-1) @ v


def weights_transposed(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k).softmax(-1).mT @ v


def logits_transposed(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k).mT.softmax(-1) @ v


def weights_swap_heads(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k).softmax(-1)[:, [1, 0, 2, 3]] @ v


def weights_scaled(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (logits(q, k).softmax(-1) * 2) @ v


def talking_heads(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mixed = torch.einsum("bhts,gh->bgts", logits(q, k), m.sink[:, None] * m.slopes)
    return mixed.softmax(-1) @ v


def queries_times_values(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def sink(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    beside = m.sink[None, :, None, None].expand(q.shape[0], 4, q.shape[2], 1)
    return torch.cat([logits(q, k), beside], -1).softmax(-1)[..., :-1] @ v


def batch_as_heads(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return (logits(q, k).softmax(-1) @ v).transpose(0, 1)


def over_channels(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (v @ logits(q.mT, k.mT).softmax(-1)).contiguous()


def scrambled(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # a reshape without the transposition: rows of several positions become one
    return logits(q.transpose(1, 2).reshape(q.shape), k).softmax(-1) @ v


def reversed_keys(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return logits(q, k.flip(2)).softmax(-1) @ v


def masked_then_negated(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (logits(q, k).masked_fill(hidden, -1e4) * -1.0).softmax(-1) @ v


def rounded(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (logits(q, k) * 4).to(torch.int64).float().softmax(-1) @ v


NOT_ATTENTION = {
    "dropout in sdpa": (dropped, "drops weights at random"),
    "dropout on weights": (weights_dropped, ""),
    "softmax over queries": (wrong_axis, "the softmax is not over the keys"),
    "softmax over heads": (over_heads, "the softmax is not over the keys"),
    "softcap": (softcap, "the logits go through tanh"),
    "squared logits": (squared, "the logits go through square"),
    "a factor for each head": (factor_of_heads, "the logits go through mul"),
    "weights transposed": (weights_transposed, "the weights are rearranged"),
    "logits transposed": (logits_transposed, "rearranges the logits"),
    "weights change heads": (weights_swap_heads, "the weights are rearranged"),
    "weights scaled": (weights_scaled, ""),
    "heads mixed": (talking_heads, "the logits"),
    "linear attention": (queries_times_values, "the logits"),
    "sink": (sink, ""),
    "over channels": (over_channels, ""),
    "scrambled": (scrambled, "the queries are not the heads"),
    "keys reversed": (reversed_keys, "the keys are not the heads"),
    "negated after the mask": (masked_then_negated, "masked logits are multiplied by -1"),
    "rounded": (rounded, "the logits go through _to_copy"),
    "heads in front": (batch_as_heads, "are not the heads"),
}


@pytest.mark.parametrize(("attend", "reason"), NOT_ATTENTION.values(), ids=NOT_ATTENTION.keys())
def test_not_attention(attend: Function, reason: str, lift: Any) -> None:
    lifted = lift(Heads(attend), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == 0
    assert reason in lifted.reasons
    lifted.check({"x": torch.randn(3, 5, 32)})


def alibi(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=-distance.abs() * m.slopes[:, None, None])


def finite_band(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -5.0).triu(1)
    return (logits(q, k) + mask).softmax(-1) @ v


def checkerboard(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=distance % 2 == 0)


def prefix(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    keys, queries = torch.arange(k.shape[2])[None, :], torch.arange(q.shape[2])[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(keys <= queries) | (keys < 3))


def other_heads_other_masks(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    seen = distance.abs()[None] <= torch.arange(1, 5)[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def anti_causal_start(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    seen = (distance < -2) | (distance == 0)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


BIASES = (alibi, finite_band, checkerboard, prefix, other_heads_other_masks, anti_causal_start)


@pytest.mark.parametrize("attend", BIASES)
def test_what_is_no_band_stays_a_bias(attend: Function, lift: Any) -> None:
    lifted = lift(Heads(attend), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == 1
    found = lifted.attributes("xf.attention")
    assert (found["causal"], found["window_left"], found["window_right"]) == (False, -1, -1)
    assert lifted.operand("xf.attention", "bias") is not None
    for batch, length in ((1, 1), (3, 17)):
        lifted.check({"x": torch.randn(batch, length, 32)})


def documents(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    same = mask[:, None, :, None] == mask[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=same)


def hidden_queries(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logits(q, k).masked_fill(mask[:, None, :, None] == 0, -1e4)).softmax(-1) @ v


def shifted(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    seen = mask.roll(1, 1)[:, None, None, :] != 0
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def soft(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logits(q, k) + (1.0 - mask[:, None, None, :]) * -3.0).softmax(-1) @ v


def first_key_always(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    seen = (mask != 0)[:, None, None, :] | (torch.arange(k.shape[2]) == 0)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


KEYED = (documents, hidden_queries, shifted, soft, first_key_always)


@pytest.mark.parametrize("attend", KEYED)
def test_what_is_no_key_mask_stays_a_bias(attend: Function, lift: Any) -> None:
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    lifted = lift(Heads(attend), x=torch.randn(2, 9, 32), mask=mask)
    assert lifted.operand("xf.attention", "key_mask") is None
    assert lifted.operand("xf.attention", "bias") is not None
    other = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    lifted.check({"x": torch.randn(3, 5, 32), "mask": other})


class Uneven(nn.Module):
    """Causal attention between sequences of different length."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.fused = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), fused

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = ((self.q, x), (self.k, y), (self.v, y))
        q, k, v = (p(z).unflatten(-1, (4, 8)).transpose(1, 2) for p, z in parts)
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@pytest.mark.parametrize("fused", [True, False])
def test_causal_between_different_lengths(fused: bool, lift: Any) -> None:
    """``is_causal`` aligns the beginnings, ``xf.attention`` the ends."""
    lifted = lift(Uneven(fused), x=torch.randn(2, 9, 32), y=torch.randn(2, 5, 32))
    assert not any(lifted.attributes("xf.attention", i)["causal"] for i in range(lifted.operators["xf.attention"]))
    lifted.check({"x": torch.randn(3, 4, 32), "y": torch.randn(3, 7, 32)})
