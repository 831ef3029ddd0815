"""Attention as people write it by hand: every spelling becomes one ``xf.attention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Projections, a way to split heads, a way to attend."""

    def __init__(self, attend: Callable[..., torch.Tensor], kv: int = 32, values: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, kv, bias=False), nn.Linear(32, values or kv)
        self.attend = attend
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def heads(self, x: torch.Tensor, y: torch.Tensor) -> Heads:
        q, k, v = self.q(x), self.k(y), self.v(y)
        count = k.shape[2] // 8
        return (
            q.view(*q.shape[:2], 4, 8).transpose(1, 2),
            k.view(*k.shape[:2], count, 8).transpose(1, 2),
            v.view(*v.shape[:2], count, -1).transpose(1, 2),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = self.attend(self, *self.heads(x, x), *(() if mask is None else (mask,)))
        return out.transpose(1, 2).flatten(2)


def positions(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return j - i."""
    return torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]


def softmax_of(logits: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, -1) @ v


def plain(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax_of(q @ k.transpose(-2, -1) / math.sqrt(8), v)


def scale_on_both(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax_of((q * 8**-0.25) @ (k * 8**-0.25).mT, v)


def no_scale(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax_of(q @ k.mT, v)


def negative_scale(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax_of(-0.5 * (q @ k.mT), v)


def einsum(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (torch.einsum("bhtd,bhsd->bhts", q, k) * 0.3).softmax(dim=3)
    return torch.einsum("bhts,bhsd->bhtd", weights, v)


def batched(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, T = q.shape[0], q.shape[2]
    q, k, v = (x.reshape(B * 4, T, 8) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * 0.35, k.transpose(1, 2)).softmax(-1), v).view(B, 4, T, 8)


def baddbmm(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, T = q.shape[0], q.shape[2]
    q, k, v = (x.reshape(B * 4, T, 8) for x in (q, k, v))
    bias = torch.zeros(1, 1, 1).expand(B * 4, T, T)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), beta=1, alpha=0.35).softmax(-1), v).view(B, 4, T, 8)


def sdpa(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def sdpa_scaled(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=0.2)


def repeated(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return plain(m, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def expanded(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, T = q.shape[0], q.shape[2]
    k, v = (x[:, :, None].expand(B, 2, 2, T, 8).reshape(B, 4, T, 8) for x in (k, v))
    return plain(m, q, k, v)


def grouped_sdpa(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def grouped_axes(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = q.unflatten(1, (2, 2))
    return softmax_of(q @ k[:, :, None].mT * 0.35, v[:, :, None]).flatten(1, 2)


FORMS: dict[str, tuple[Any, dict[str, int], float, int]] = {
    "plain": (plain, {}, 8**-0.5, 4),
    "scale on queries and keys": (scale_on_both, {}, 8**-0.5, 4),
    "no scale": (no_scale, {}, 1.0, 4),
    "negative scale": (negative_scale, {}, -0.5, 4),
    "einsum": (einsum, {}, 0.3, 4),
    "bmm": (batched, {}, 0.35, 4),
    "sdpa": (sdpa, {}, 8**-0.5, 4),
    "sdpa with a scale": (sdpa_scaled, {}, 0.2, 4),
    "values of another width": (plain, {"values": 64}, 8**-0.5, 4),
    "grouped, repeated": (repeated, {"kv": 16}, 8**-0.5, 2),
    "grouped, expanded": (expanded, {"kv": 16}, 8**-0.5, 2),
    "grouped, sdpa": (grouped_sdpa, {"kv": 16}, 8**-0.5, 2),
    "grouped, five axes": (grouped_axes, {"kv": 16}, 0.35, 2),
    "multi-query, broadcast": (plain, {"kv": 8}, 8**-0.5, 1),
}


@pytest.mark.parametrize(("attend", "sizes", "scale", "kv_heads"), FORMS.values(), ids=FORMS.keys())
def test_every_spelling_is_attention(
    attend: Any, sizes: dict[str, int], scale: float, kv_heads: int, lift: Any
) -> None:
    lifted = lift(Attention(attend, **sizes), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == 1
    assert not [name for name in lifted.operators if "softmax" in name or "scaled_dot" in name]
    found = lifted.attributes("xf.attention")
    assert found["scale"] == pytest.approx(scale)
    assert (found["heads"], found["kv_heads"]) == (4, kv_heads)
    assert lifted.operand("xf.attention", "bias") is None
    for batch, length in ((1, 1), (3, 7), (1, 33)):
        lifted.check({"x": torch.randn(batch, length, 32)})


def test_a_zero_bias_is_no_bias_or_is_kept(lift: Any) -> None:
    lifted = lift(Attention(baddbmm), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == 1
    lifted.check({"x": torch.randn(3, 5, 32)})


def causal_buffer(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    T = q.shape[2]
    return softmax_of((q @ k.mT * 0.35).masked_fill(m.tril[:, :, :T, :T] == 0, float("-inf")), v)


def causal_triu(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.triu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), diagonal=1)
    return softmax_of((q @ k.mT * 0.35).masked_fill(hidden, -1e9), v)


def causal_where(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    lowest = torch.tensor(torch.finfo(torch.float32).min)
    return softmax_of(torch.where(positions(q, k) <= 0, q @ k.mT * 0.35, lowest), v)


def causal_added(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
    return softmax_of(q @ k.mT * 0.35 + mask, v)


def causal_sdpa(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def windowed(left: int, right: int) -> Callable[..., torch.Tensor]:
    def attend(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        distance = positions(q, k)
        seen = (distance >= -left) & (distance <= right)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return attend


def two_masks(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    logits = (q @ k.mT * 0.35).masked_fill(positions(q, k) > 0, float("-inf"))
    return softmax_of(logits.masked_fill(positions(q, k) < -3, float("-inf")), v)


BANDS: dict[str, tuple[Any, tuple[bool, int, int]]] = {
    "buffer": (causal_buffer, (True, -1, -1)),
    "triu": (causal_triu, (True, -1, -1)),
    "where": (causal_where, (True, -1, -1)),
    "added": (causal_added, (True, -1, -1)),
    "sdpa": (causal_sdpa, (True, -1, -1)),
    "window": (windowed(3, 3), (False, 3, 3)),
    "lopsided window": (windowed(2, 5), (False, 2, 5)),
    "causal window": (windowed(4, 0), (True, 4, -1)),
    "only the diagonal": (windowed(0, 0), (True, 0, -1)),
    # a window beyond any small probe looks like no window
    "wide causal window": (windowed(300, 0), (True, 300, -1)),
    "two masks": (two_masks, (True, 3, -1)),
}


@pytest.mark.parametrize(("attend", "band"), BANDS.values(), ids=BANDS.keys())
def test_bands_are_attributes(attend: Any, band: tuple[bool, int, int], lift: Any) -> None:
    lifted = lift(Attention(attend), x=torch.randn(2, 9, 32))
    found = lifted.attributes("xf.attention")
    assert (found["causal"], found["window_left"], found["window_right"]) == band
    assert lifted.operand("xf.attention", "bias") is None
    for batch, length in ((1, 1), (3, 7), (1, 41)):
        lifted.check({"x": torch.randn(batch, length, 32)})


def hide_zero(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return softmax_of((q @ k.mT * 0.35).masked_fill(mask[:, None, None, :] == 0, -1e9), v)


def add_inverted(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return softmax_of(q @ k.mT * 0.35 + (1.0 - mask[:, None, None, :].float()) * -10000.0, v)


def keep_sdpa(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None, :])


def both(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    seen = mask.bool()[:, None, None, :] & (positions(q, k) <= 0)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def hide_in_batches(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    B, T = q.shape[0], q.shape[2]
    hidden = (mask == 0)[:, None, None, :].expand(B, 4, T, T).reshape(B * 4, T, T)
    q, k, v = (x.reshape(B * 4, T, 8) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * 0.35, k.mT).masked_fill(hidden, float("-inf")).softmax(-1), v).view(B, 4, T, 8)


KEYS = {"masked_fill": hide_zero, "added": add_inverted, "sdpa": keep_sdpa, "causal": both, "bmm": hide_in_batches}


@pytest.mark.parametrize("attend", KEYS.values(), ids=KEYS.keys())
def test_padding_is_a_key_mask(attend: Any, lift: Any) -> None:
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    lifted = lift(Attention(attend), x=torch.randn(2, 9, 32), mask=mask)
    assert lifted.operators["xf.attention"] == 1
    assert lifted.operand("xf.attention", "key_mask") is not None
    assert lifted.operand("xf.attention", "bias") is None
    assert lifted.attributes("xf.attention")["causal"] is (attend is both)
    lifted.check({"x": torch.randn(3, 4, 32), "mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]])})


def test_a_mask_that_says_what_is_padding(lift: Any) -> None:
    def attend(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return softmax_of((q @ k.mT * 0.35).masked_fill(mask[:, None, None, :], float("-inf")), v)

    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    lifted = lift(Attention(attend), x=torch.randn(2, 9, 32), mask=padding)
    assert lifted.operators["xf.attention"] == 1
    assert lifted.operand("xf.attention", "key_mask").target is torch.ops.aten.logical_not.default
    lifted.check({"x": torch.randn(1, 3, 32), "mask": torch.tensor([[False, True, False]])})


class Fused(nn.Module):
    """One projection; ``split`` cuts its channels into queries, keys and values."""

    def __init__(self, split: Callable[[torch.Tensor], Heads]) -> None:
        super().__init__()
        self.qkv, self.split = nn.Linear(32, 96), split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.qkv(x))
        return softmax_of((q * 8**-0.5) @ k.mT, v).transpose(1, 2).reshape(x.shape)


SPLITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "three, heads, width": lambda y: y.reshape(*y.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0),
    "heads, three, width": lambda y: (z.transpose(1, 2) for z in y.view(*y.shape[:2], 4, 24).split(8, -1)),
    "heads, width, three": lambda y: y.view(*y.shape[:2], 4, 8, 3).permute(4, 0, 2, 1, 3).unbind(0),
    "chunks": lambda y: (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in y.chunk(3, -1)),
    "slices": lambda y: (y[:, :, i : i + 32].unflatten(-1, (4, 8)).movedim(2, 1) for i in (0, 32, 64)),
    "width before heads": lambda y: (z.unflatten(-1, (8, 4)).permute(0, 3, 1, 2) for z in y.chunk(3, -1)),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_channels_are_chosen_in_the_weight(split: Any, lift: Any) -> None:
    lifted = lift(Fused(split), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == 1
    # three projections, or one and what is cut from it; nothing is gathered at run time
    assert lifted.operators["aten.index_select"] == 0
    lifted.check({"x": torch.randn(3, 1, 32)})


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(24, 64)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.mT * 8**-0.5).masked_fill(~mask.bool()[:, None, None], float("-inf"))
        return softmax_of(logits, v).transpose(1, 2).reshape(x.shape)


def test_cross_attention(lift: Any) -> None:
    lifted = lift(Cross(), x=torch.randn(2, 9, 32), y=torch.randn(2, 5, 24), mask=torch.ones(2, 5, dtype=torch.long))
    assert lifted.operators["xf.attention"] == 1
    assert lifted.operand("xf.attention", "key_mask") is not None
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [1] * 11])
    lifted.check({"x": torch.randn(2, 3, 32), "y": torch.randn(2, 11, 24), "mask": mask})


class SingleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return softmax_of(self.q(x) @ self.k(x).transpose(1, 2) / 32**0.5, self.v(x))


class NoProjection(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("kind", [SingleHead, NoProjection])
def test_one_head_needs_no_head_axis(kind: type[nn.Module], lift: Any) -> None:
    lifted = lift(kind(), x=torch.randn(2, 9, 32))
    assert lifted.operators["xf.attention"] == 1
    assert lifted.attributes("xf.attention")["heads"] == 1
    lifted.check({"x": torch.randn(1, 4, 32)})
