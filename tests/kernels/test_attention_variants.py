"""Operators beside softmax attention: each against loops or another formula, and what torch asks of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from attention_formulas import (
    DOUBLE,
    HEADS,
    D,
    E,
    block_sparse,
    channels,
    entmax_by_loops,
    flow,
    local,
    manhattan,
    one_query,
    randn,
    toeplitz,
)

from xformopt.kernels.definition import Operator, load_operators, xf
from xformopt.kernels.entmax_attention import entmax
from xformopt.kernels.flow_attention import flow_attention, flow_attention_start, flow_attention_step
from xformopt.kernels.prefix_scan_attention import (
    prefix_scan_attention_masked,
    prefix_scan_attention_start,
    prefix_scan_attention_step,
)
from xformopt.kernels.toeplitz_attention import toeplitz_attention_fft

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Case:
    """One use of an operator: arguments, another formula for the result, and its cost."""

    name: str
    arguments: Callable[[], tuple[torch.Tensor | None, ...]]
    formula: Callable[..., torch.Tensor]
    flops: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def operator(self) -> Operator:
        return load_operators()[self.name]


def qkv(T: int, B: int = 2, S: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(B, T, HEADS * D), randn(B, S or T, HEADS * D), randn(B, S or T, HEADS * E)


def padding(T: int) -> torch.Tensor:
    """Two sequences: all tokens but two, and none."""
    return torch.stack([torch.arange(T) >= 2, torch.zeros(T, dtype=torch.bool)])


# the second row of blocks keeps nothing
BLOCKS = torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 1, 1]], [[0, 1, 0], [0, 0, 0], [0, 0, 1]]]).bool()

WINDOW = {"heads": HEADS, "scale": 0.7}
# 16 queries together
PAIRS = 2 * 2 * HEADS * (D + E)
CASES = [
    Case("local_attention", lambda: qkv(9), local, PAIRS * 16 * 19, {**WINDOW, "window_left": 2, "window_right": 1}),
    Case("local_attention", lambda: (*qkv(9), padding(9)), local, PAIRS * 16 * 19, {**WINDOW, "window_left": 3}),
    Case(
        "local_attention",
        lambda: (*qkv(9), padding(9)),
        local,
        PAIRS * (32 * 18 + 3 * 9),
        {**WINDOW, "window_left": 2, "dilation": 2, "stripe": 3, "causal": True},
    ),
    Case(
        "local_attention",
        lambda: qkv(9),
        local,
        PAIRS * (48 * 18 + 4 * 9),
        {**WINDOW, "window_left": 1, "window_right": 1, "dilation": 3, "stripe": 4},
    ),
    Case(
        "local_attention",
        lambda: (*qkv(9), padding(9), randn(1, HEADS, 9, 9)),
        local,
        PAIRS * 16 * 19,
        {**WINDOW, "window_left": 3},
    ),
    Case(
        "block_sparse_attention",
        lambda: (*qkv(8, S=7), BLOCKS),
        block_sparse,
        4 * 7 * 9 * (D + E),
        {**WINDOW, "block": 3},
    ),
    Case(
        "block_sparse_attention",
        lambda: (*qkv(9), BLOCKS[:1], padding(9)),
        block_sparse,
        4 * 10 * 9 * (D + E),
        {**WINDOW, "block": 3, "causal": True},
    ),
    Case(
        "block_sparse_attention",
        lambda: (*qkv(8, S=7), BLOCKS, None, randn(1, HEADS, 8, 7)),
        block_sparse,
        4 * 7 * 9 * (D + E),
        {**WINDOW, "block": 3},
    ),
    *(
        Case(
            "entmax_attention",
            lambda: (*qkv(6, S=9), padding(9)),
            entmax_by_loops,
            2 * 6 * 9 * HEADS * (2 * (D + E) + (8 if alpha < 1.8 else 11) * 9),
            {**WINDOW, "alpha": alpha},
        )
        for alpha in (1.2, 1.5, 1.7, 2.0)
    ),
    Case(
        "entmax_attention",
        lambda: qkv(9),
        entmax_by_loops,
        2 * 9 * 9 * HEADS * (2 * (D + E) + 8 * 9),
        {**WINDOW, "causal": True},
    ),
    Case(
        "flow_attention",
        lambda: qkv(6, S=9),
        flow,
        7 * 2 * 15 * HEADS * D + 4 * HEADS * 15 * D * E,
        {"heads": HEADS},
    ),
    Case(
        "flow_attention",
        lambda: (*qkv(9), padding(9), padding(9)),
        flow,
        7 * 2 * 18 * HEADS * D + 4 * HEADS * 18 * D * E,
        {"heads": HEADS},
    ),
    *(
        Case(
            "flow_attention",
            arguments,
            flow,
            7 * 2 * 18 * HEADS * D + 4 * 64 * HEADS * (64 * (D + E) + 2 * D * E),
            {"heads": HEADS, "causal": True},
        )
        for arguments in (lambda: qkv(9), lambda: (*qkv(9), padding(9), padding(9)))
    ),
    *(
        Case(
            "prefix_scan_attention",
            arguments,
            one_query,
            4 * 9 * HEADS * D + 4 * HEADS * (64 * 64 * E + E + 1),
            WINDOW,
        )
        for arguments in (
            lambda: (randn(HEADS * D), *qkv(9)[1:]),
            lambda: (randn(HEADS * D), *qkv(9)[1:], padding(9)),
        )
    ),
    Case(
        "toeplitz_attention",
        lambda: (*qkv(9), randn(HEADS, 21), padding(9), randn(HEADS, D, 4)),
        toeplitz,
        4 * 2 * 9 * HEADS * D * 4 + 4 * 9 * 9 * HEADS * (4 + E),
        {"heads": HEADS, "causal": True},
    ),
    Case(
        "toeplitz_attention",
        lambda: (*(x.abs() for x in qkv(9)), randn(1, 17)),
        toeplitz,
        4 * 9 * 9 * HEADS * (D + E),
        {"heads": HEADS},
    ),
    *(
        Case(
            "manhattan_attention",
            lambda: (*qkv(12), -torch.rand(HEADS, dtype=DOUBLE)),
            manhattan,
            4 * 12 * (7 if decomposed else 12) * HEADS * (D + E),
            {**WINDOW, "rows": 3, "columns": 4, "decomposed": decomposed},
        )
        for decomposed in (False, True)
    ),
    Case(
        "xca",
        lambda: (randn(2, 9, 6), randn(2, 9, 6), randn(2, 9, 6), torch.rand(2, dtype=DOUBLE) + 1),
        channels,
        4 * 2 * 9 * 6 * 3 + 6 * 2 * 9 * 6,
        {"heads": HEADS},
    ),
    Case(
        "xca",
        lambda: (randn(2, 9, 6), randn(2, 9, 6), randn(2, 9, 6), torch.rand(2, dtype=DOUBLE) + 1, padding(9)),
        channels,
        4 * 2 * 9 * 6 * 3 + 6 * 2 * 9 * 6,
        {"heads": HEADS, "top": 2},
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{number}" for number, case in enumerate(CASES)])


@every_case
def test_definition_is_the_formula(case: Case) -> None:
    arguments = case.arguments()
    found = case.operator.overload(*arguments, **case.options)
    torch.testing.assert_close(found, case.formula(*arguments, **case.options), **CLOSE)


@every_case
def test_float32_is_close_to_the_formula(case: Case) -> None:
    exact = case.arguments()
    rounded = tuple(a.float() if a is not None and a.is_floating_point() else a for a in exact)
    found = case.operator.overload(*rounded, **case.options).double()
    torch.testing.assert_close(found, case.formula(*exact, **case.options), rtol=2e-5, atol=2e-5)


@every_case
def test_shape_rule_tells_the_real_shape(case: Case) -> None:
    arguments = case.arguments()
    inferred = case.operator.infer(*arguments, **case.options)
    real = case.operator.reference(*arguments, **case.options)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (real.shape, real.dtype, real.stride())


@every_case
def test_cost_is_the_formula_at_a_known_shape(case: Case) -> None:
    assert case.operator.flops(*case.arguments(), **case.options) == case.flops


@every_case
def test_torch_accepts_the_operator(case: Case) -> None:
    arguments = tuple(a.requires_grad_() if a is not None and a.is_floating_point() else a for a in case.arguments())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(case.operator.overload, arguments, case.options, test_utils=checks)


@pytest.mark.slow
@every_case
def test_torch_traces_the_operator_and_its_gradient(case: Case) -> None:
    arguments = tuple(a.requires_grad_() if a is not None and a.is_floating_point() else a for a in case.arguments())
    torch.library.opcheck(case.operator.overload, arguments, case.options, test_utils="test_aot_dispatch_dynamic")


@every_case
def test_gradients(case: Case) -> None:
    arguments = case.arguments()
    positions = [i for i, a in enumerate(arguments) if a is not None and a.is_floating_point()]

    def call(*given: torch.Tensor) -> Any:
        filled = list(arguments)
        for position, value in zip(positions, given, strict=True):
            filled[position] = value
        return case.operator.overload(*filled, **case.options)

    inputs = [arguments[i].clone().requires_grad_() for i in positions]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_toeplitz_attention_is_the_same_by_fourier_transforms(T: int, causal: bool) -> None:
    arguments, w = (*qkv(T), randn(HEADS, 2 * 40 - 1)), randn(HEADS, D, 4)
    found = toeplitz_attention_fft(*arguments, w, heads=HEADS, causal=causal)
    expected = xf.toeplitz_attention(*arguments, None, w, heads=HEADS, causal=causal)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("T", [1, 5, 70])
def test_a_step_of_flow_attention_is_its_next_token(T: int) -> None:
    q, k, v = qkv(T)
    state = flow_attention_start(q[:, 0], v[:, 0], heads=HEADS)
    outputs = []
    for t in range(T):
        state, output = flow_attention_step(state, q[:, t], k[:, t], v[:, t], heads=HEADS)
        outputs.append(output)
    expected = torch.stack(outputs, 1)
    torch.testing.assert_close(xf.flow_attention(q, k, v, heads=HEADS, causal=True), expected, **CLOSE)
    torch.testing.assert_close(flow_attention(q, k, v, heads=HEADS, causal=True, chunk=4), expected, **CLOSE)


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_a_prefix_scan_is_masked_attention_and_its_steps(T: int, size: float) -> None:
    q, (_, k, v) = randn(HEADS * D) * size, qkv(T)
    state = prefix_scan_attention_start(v[:, 0], heads=HEADS)
    outputs = []
    for t in range(T):
        state, output = prefix_scan_attention_step(state, q, k[:, t], v[:, t], **WINDOW)
        outputs.append(output)
    expected = torch.stack(outputs, 1)
    torch.testing.assert_close(xf.prefix_scan_attention(q, k, v, **WINDOW), expected, **CLOSE)
    torch.testing.assert_close(prefix_scan_attention_masked(q, k, v, **WINDOW), expected, **CLOSE)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 100.0])
def test_entmax_finds_its_threshold_among_many_keys(alpha: float, spread: float) -> None:
    # thresholds at both ends of the bracket
    scores = randn(4, 2000) * spread
    low = (alpha - 1) * scores.amax(-1, keepdim=True) - 1
    high = low + 1
    for _ in range(100):
        middle = (low + high) / 2
        total = (((alpha - 1) * scores - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True)
        low, high = torch.where(total > 1, middle, low), torch.where(total > 1, high, middle)
    expected = ((alpha - 1) * scores - low).clamp(min=0) ** (1 / (alpha - 1))
    torch.testing.assert_close(entmax(scores, torch.ones(2000, dtype=torch.bool), alpha), expected, **CLOSE)


def fake(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Tensors without data, which only the shape rule sees."""
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


QKV = ((1, 5, 6), (1, 5, 6), (1, 5, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: xf.local_attention(*fake((1, 5, 6), (1, 7, 6), (1, 7, 6)), heads=2, scale=1.0, window_left=1),
            "one key for each query",
        ),
        (lambda: xf.local_attention(*fake(*QKV), heads=2, scale=1.0, window_left=-1), "a bound on each side"),
        (
            lambda: xf.local_attention(*fake(*QKV), heads=2, scale=1.0, window_left=1, window_right=1, causal=True),
            "no keys on its right",
        ),
        (lambda: xf.local_attention(*fake(*QKV), heads=2, scale=1.0, window_left=1, dilation=0), "at least 1"),
        (
            lambda: xf.local_attention(
                *fake(*QKV), None, *fake((1, 2, 5, 5)), heads=2, scale=1.0, window_left=1, dilation=2
            ),
            "neither dilation nor stripes",
        ),
        (
            lambda: xf.block_sparse_attention(*fake(*QKV), fake((1, 2, 2))[0].bool(), heads=2, scale=1.0, block=2),
            "more queries than the block mask covers",
        ),
        (
            lambda: xf.block_sparse_attention(*fake(*QKV), fake((1, 3, 2))[0].bool(), heads=2, scale=1.0, block=2),
            "more keys than the block mask covers",
        ),
        (
            lambda: xf.block_sparse_attention(*fake(*QKV), fake((3, 3, 3))[0].bool(), heads=2, scale=1.0, block=2),
            "not one block mask for all heads or for each",
        ),
        (
            lambda: xf.block_sparse_attention(*fake(*QKV, (1, 3, 3)), heads=2, scale=1.0, block=2),
            "the block mask must be bool",
        ),
        (
            lambda: xf.block_sparse_attention(
                *fake(*QKV), fake((1, 3, 3))[0].bool(), None, *fake((1, 2, 4, 5)), heads=2, scale=1.0, block=2
            ),
            "the bias and q disagree on the queries",
        ),
        (lambda: xf.entmax_attention(*fake(*QKV), heads=2, scale=1.0, alpha=1.0), "alpha must be above 1"),
        (
            lambda: xf.flow_attention(*fake((1, 5, 6), (1, 7, 6), (1, 7, 6)), heads=2, causal=True),
            "one key for each query",
        ),
        (lambda: xf.prefix_scan_attention(*fake(*QKV), heads=2, scale=1.0), "one query for all tokens"),
        (lambda: xf.toeplitz_attention(*fake(*QKV, (1, 7)), heads=2), "more tokens than the bias has distances"),
        (lambda: xf.toeplitz_attention(*fake(*QKV, (1, 10)), heads=2), "no middle"),
        (
            lambda: xf.manhattan_attention(*fake(*QKV, (2,)), heads=2, scale=1.0, rows=2, columns=3),
            "do not fill the grid",
        ),
        (lambda: xf.xca(*fake(*QKV, (3,)), heads=2), "not one temperature for each head"),
        (lambda: xf.xca(*fake((1, 5, 6), (1, 5, 6), (1, 5, 4), (2,)), heads=2), "disagree on the channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
