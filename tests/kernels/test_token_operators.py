"""Operators that shorten sequences: against loops over numbers, their costs, gradients, and what torch asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from xformopt.kernels.definition import Operator, load_operators, xf

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """One use of an operator: arguments, its cost, options."""

    name: str
    arguments: Callable[[], tuple[torch.Tensor | None, ...]]
    flops: int
    options: dict[str, Any] = field(default_factory=dict)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


KEPT = torch.tensor([[0, 4, 2, 6, 1], [0, 2, 1, 3, 5]])
SOURCES = torch.tensor([[3, 5], [4, 6]])
DESTINATIONS = torch.tensor([[3, 3], [2, 4]])
PAIRS = (KEPT, SOURCES, DESTINATIONS)
SIZES = torch.tensor([[1, 2, 1, 1, 3, 1, 1], [1, 1, 0, 1, 0, 0, 0]], dtype=DOUBLE)
MIX = {"prefix": 1, "neighbours": 2, "temperature": 0.5, "r": 3}
HEADS = {"heads": 2, "kv_heads": 2, "scale": 0.7}
CASES = [
    # 6 tokens behind the prefix: 3 and 3 of width 4
    Case(
        "match_tokens",
        lambda: (randn(2, 7, 8),),
        2 * 7 * 8 + 3 * 2 * 7 * 4 + 2 * 2 * 9 * 4,
        {"heads": 2, "prefix": 1, "r": 2},
    ),
    Case(
        "match_tokens",
        lambda: (randn(2, 7, 8), SIZES),
        2 * 7 * 8 + 3 * 2 * 7 * 8 + 2 * 2 * 12 * 8,
        {"heads": 1, "prefix": 0, "r": 3},
    ),
    Case("merge_tokens", lambda: (randn(2, 7, 4), *PAIRS), 2 * 2 * 7 * 4),
    Case("merge_tokens", lambda: (randn(2, 7, 4), *PAIRS, SIZES.clamp(min=0.5)), 2 * 2 * 7 * 4),
    Case("restore_tokens", lambda: (randn(2, 5, 4), *PAIRS), 0),
    Case("select_tokens", lambda: (randn(2, 7, 4), KEPT), 0),
    Case("rank_tokens", lambda: (randn(2, 7),), 0, {"prefix": 2, "r": 3}),
    Case("changed_tokens", lambda: (randn(2, 7, 4), randn(2, 7, 4), torch.arange(3)), 3 * 2 * 7 * 4),
    Case("update_tokens", lambda: (randn(2, 7, 4), KEPT, randn(2, 5, 4)), 0),
    Case("attention_received", lambda: (randn(2, 7, 8), randn(2, 7, 8)), 2 * 98 * 8 + 9 * 98 * 2, HEADS),
    Case(
        "attention_received",
        lambda: (randn(2, 7, 8), randn(2, 7, 4), SIZES > 0, randn(2, 7)),
        2 * 14 * 8 + 9 * 14 * 2,
        HEADS | {"kv_heads": 1, "first": 1},
    ),
    # 3 anchors and 6 tokens behind the prefix
    Case(
        "transform_tokens",
        lambda: (randn(2, 7, 8), randn(2, 7)),
        2 * (3 * 7 * 8 + 2 * 18 * 8 + 6 * 18),
        MIX,
    ),
]
IDS = [f"{case.name}-{number}" for number, case in enumerate(CASES)]


def operator(case: Case) -> Operator:
    return load_operators()[case.name]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_shape_rule_and_cost(case: Case) -> None:
    arguments = case.arguments()
    inferred = operator(case).infer(*arguments, **case.options)
    real = operator(case).overload(*arguments, **case.options)
    for guess, value in zip(*(r if isinstance(r, tuple) else (r,) for r in (inferred, real)), strict=True):
        assert (guess.shape, guess.dtype, guess.stride()) == (value.shape, value.dtype, value.stride())
    assert operator(case).flops(*arguments, **case.options) == case.flops


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_torch_accepts_the_operator(case: Case) -> None:
    torch.library.opcheck(operator(case).overload, case.arguments(), case.options)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("match_tokens", "rank_tokens", "changed_tokens")])
def test_gradients(case: Case) -> None:
    arguments = case.arguments()
    given = [a.requires_grad_() if a is not None and a.is_floating_point() else a for a in arguments]
    if case.name == "transform_tokens":
        given[1] = arguments[1].detach()  # type: ignore[union-attr]  # a ranking has no gradient

    def call(*values: Any) -> Any:
        return operator(case).overload(*values, **case.options)

    assert torch.autograd.gradcheck(call, given, fast_mode=True)


def matched(keys: np.ndarray, heads: int, prefix: int, r: int) -> list[tuple[int, int]]:
    """Bipartite soft matching of one sequence, pair by pair: (what is merged away, what it joins)."""
    metric = [[sum(row[h * 4 + c] for h in range(heads)) / heads for c in range(4)] for row in keys]

    def cosine(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(metric[i], metric[j], strict=True))
        return dot / math.sqrt(sum(a * a for a in metric[i])) / math.sqrt(sum(b * b for b in metric[j]))

    A, B = range(prefix, len(keys), 2), range(prefix + 1, len(keys), 2)
    pairs = sorted((max((cosine(a, b), -b) for b in B), a) for a in A)[::-1]
    return [(a, -b) for (_, b), a in pairs[:r]]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_matching_and_merging_are_tome(prefix: int) -> None:
    keys, x, sizes = randn(2, 12, 8), randn(2, 12, 3), torch.rand(2, 12, dtype=DOUBLE) + 1
    kept, sources, destinations = xf.match_tokens(keys, heads=2, prefix=prefix, r=4)
    tokens, total = xf.merge_tokens(x, kept, sources, destinations, sizes)
    restored = xf.restore_tokens(tokens, kept, sources, destinations)
    for row in range(2):
        groups = {index: [index] for index in range(12)}
        for away, to in matched(keys[row].numpy(), 2, prefix, 4):
            groups[to] += groups.pop(away)
        assert sorted(kept[row].tolist()) == sorted(groups)
        assert kept[row, :prefix].tolist() == list(range(prefix))
        for place, index in enumerate(kept[row].tolist()):
            members = groups[index]
            weights = sizes[row, members]
            wanted = (x[row, members] * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(tokens[row, place], wanted)
            torch.testing.assert_close(total[row, place], weights.sum())
            for member in members:
                torch.testing.assert_close(restored[row, member], wanted)


def test_padding_goes_first_and_changes_nothing() -> None:
    keys, x = randn(1, 9, 8), randn(1, 9, 3)
    sizes = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]], dtype=DOUBLE)
    kept, sources, destinations = xf.match_tokens(keys, sizes, heads=2, prefix=1, r=2)
    assert set(sources[0].tolist()) == {5, 7}
    tokens, total = xf.merge_tokens(x, kept, sources, destinations, sizes)
    real = total[0] > 0
    assert set(kept[0, real].tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(tokens[0, real], x[0, kept[0, real]])
    assert bool(tokens.isfinite().all())


def test_equal_tokens_merge_without_loss() -> None:
    x = randn(1, 4, 3).repeat_interleave(2, 1)
    pairs = xf.match_tokens(x, heads=1, prefix=0, r=4)
    tokens, total = xf.merge_tokens(x, *pairs)
    torch.testing.assert_close(xf.restore_tokens(tokens, *pairs), x)
    assert total.sum() == 8


def test_attention_received_is_the_mean_of_the_weights() -> None:
    q, k = randn(1, 5, 8), randn(1, 5, 8)
    log_size = randn(1, 5)
    mask = torch.tensor([[True, True, True, False, True]])
    found = xf.attention_received(q, k, mask, log_size, heads=2, kv_heads=2, scale=0.7)
    total = [0.0] * 5
    for h in range(2):
        for i in (0, 1, 2, 4):
            logits = [0.7 * float(q[0, i, h * 4 : h * 4 + 4] @ k[0, j, h * 4 : h * 4 + 4]) for j in range(5)]
            shares = [math.exp(v + float(log_size[0, j])) if bool(mask[0, j]) else 0.0 for j, v in enumerate(logits)]
            total = [t + s / sum(shares) / 8 for t, s in zip(total, shares, strict=True)]
    torch.testing.assert_close(found[0], torch.tensor(total, dtype=DOUBLE))
    first = xf.attention_received(q, k, heads=2, kv_heads=2, scale=0.7, first=1)
    every = xf.attention_received(q[:, :1], k, heads=2, kv_heads=2, scale=0.7)
    torch.testing.assert_close(first, every)


def test_ranking_keeps_the_prefix_and_the_best() -> None:
    scores = torch.tensor([[-9.0, 1.0, 5.0, 1.0, 4.0]])
    assert xf.rank_tokens(scores, prefix=1, r=2).tolist() == [[0, 2, 4]]
    assert xf.rank_tokens(scores, prefix=1, r=1).tolist() == [[0, 2, 4, 1]]
    assert xf.select_tokens(scores.unsqueeze(2), torch.tensor([[4, 0]])).flatten().tolist() == [4.0, -9.0]


def test_a_gate_lets_through_what_has_changed_most() -> None:
    reference = randn(2, 5, 3)
    x = reference.clone()
    x[0, 3] += 2.0
    x[0, 1, 0] -= 1.0
    x[1, 4, 2] += 0.5
    x[1, 0, 1] += 0.25
    assert xf.changed_tokens(x, reference, torch.arange(2)).tolist() == [[3, 1], [4, 0]]
    # of tokens that did not change, the first come first; ranks may be any
    assert xf.changed_tokens(x, reference, torch.tensor([3, 0])).tolist() == [[2, 3], [2, 4]]
    assert xf.changed_tokens(x, x, torch.arange(5)).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_buffer_keeps_what_was_not_recomputed() -> None:
    stored, fresh = randn(2, 4, 3), randn(2, 2, 3)
    found = xf.update_tokens(stored, torch.tensor([[2, 0], [1, 3]]), fresh)
    for row, (kept, left) in enumerate((((2, 0), (1, 3)), ((1, 3), (0, 2)))):
        assert torch.equal(found[row, list(kept)], fresh[row])
        assert torch.equal(found[row, list(left)], stored[row, list(left)])


def test_mixing_is_the_softmax_over_those_that_take_part() -> None:
    metric, scores = randn(1, 6, 4), randn(1, 6)
    mix, share = xf.transform_tokens(metric, scores, prefix=1, neighbours=2, temperature=0.3, r=2)
    anchors = sorted(range(1, 6), key=lambda j: -float(scores[0, j]))[:3]
    cosine = torch.nn.functional.cosine_similarity(metric[0, anchors, None], metric[0, None, 1:], dim=-1)
    for column in range(5):
        near = cosine[:, column].sort(descending=True).indices[:2].tolist()
        assert (mix[0, 1:, column + 1] > 0).nonzero().flatten().tolist() == sorted(near)
    part = (cosine / 0.3).exp() * (mix[0, 1:, 1:] > 0)
    torch.testing.assert_close(mix[0, 1:, 1:], part / part.sum(1, keepdim=True))
    torch.testing.assert_close(share.sum(1), torch.ones(1, 6, dtype=DOUBLE))
    assert mix[0, 0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: xf.match_tokens(x, heads=3, prefix=0, r=1), "the heads do not divide"),
        (lambda x: xf.match_tokens(x, heads=2, prefix=1, r=4), "of 6 tokens, 4 cannot find a partner"),
        (lambda x: xf.changed_tokens(x, x[..., :4], x[0, :, 0].long()), "disagree on the channels"),
        (lambda x: xf.update_tokens(x, x[..., 0].long(), x[..., :4]), "disagree on the channels"),
        (lambda x: xf.rank_tokens(x[..., 0], prefix=1, r=7), "of 6 tokens, 7 cannot go"),
        (lambda x: xf.transform_tokens(x, x[..., 0], **MIX | {"neighbours": 0}), "one anchor at least"),
        (lambda x: xf.transform_tokens(x, x[..., 0], **MIX | {"r": 6}), "of 6 tokens, 6 cannot go"),
        (lambda x: xf.attention_received(x, x[..., :4], **HEADS), "disagree on the head width"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[torch.Tensor], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.empty(2, 7, 8, device="meta"))
