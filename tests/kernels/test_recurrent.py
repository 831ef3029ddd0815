"""Operators with a recurrence: chunkwise, masked and step by step are one function; what torch asks of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from xformopt.kernels import delta_rule as delta
from xformopt.kernels import gated_linear_attention as gla
from xformopt.kernels import linear_attention as linear
from xformopt.kernels import retention as ret
from xformopt.kernels import rwkv as wkv
from xformopt.kernels import selective_scan as scan
from xformopt.kernels import ssd as duality
from xformopt.kernels.definition import Operator, load_operators, xf

Tensors = tuple[torch.Tensor, ...]
DOUBLE = torch.float64
HEADS, D, E = 2, 3, 5
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Case:
    """One use of an operator.

    ``inputs(B, T, strong)`` draws its arguments, with decays that all but erase a state where ``strong``; those with
    three axes run over time.  ``initial`` is the state before the first token, given the arguments.
    """

    name: str
    inputs: Callable[[int, int, bool], Tensors]
    step: Callable[..., Any]
    initial: Callable[[Tensors], Any]
    masked: Callable[..., torch.Tensor] | None
    flops: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def operator(self) -> Operator:
        return load_operators()[self.name]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def qkv(B: int, T: int) -> Tensors:
    return randn(B, T, HEADS * D), randn(B, T, HEADS * D), randn(B, T, HEADS * E)


def unit_keys(B: int, T: int) -> Tensors:
    """Keys of length one, all of a head nearly the same: what a state holds is overwritten again and again."""
    q, k, v = qkv(B, T)
    k = (1 + 0.3 * k).unflatten(-1, (HEADS, D))
    return q, (k / k.norm(dim=-1, keepdim=True)).flatten(-2), v


def decays(strong: bool, *shape: int) -> torch.Tensor:
    """Log decays: mild, or from nearly none to a factor of 1e-26 a token."""
    return -torch.rand(*shape, dtype=DOUBLE) * (60.0 if strong else 0.5)


def space(B: int, T: int, strong: bool, channels: int, heads: int, *rates: int) -> Tensors:
    """Inputs, step sizes, rates, writing, reading (states of 3, two groups of them for heads) and what goes past."""
    states = 3 if len(rates) == 2 else 2 * 3
    x, dt = randn(B, T, channels), torch.rand(B, T, heads, dtype=DOUBLE)
    return x, dt, decays(strong, *rates), randn(B, T, states), randn(B, T, states), randn(rates[0])


def zeros(*shape: int) -> Callable[[Tensors], torch.Tensor]:
    return lambda arguments: torch.zeros(arguments[0].shape[0], *shape, dtype=DOUBLE)


# of 2 sequences of 5 tokens, which fill one chunk of 64 each
PADDED = 2 * 64
CHUNKWISE = 2 * PADDED * HEADS * (64 * (D + E) + 2 * D * E)

CASES = {
    "retention": Case(
        "retention",
        lambda B, T, strong: (*qkv(B, T), decays(strong, HEADS)),
        ret.retention_step,
        zeros(HEADS, D, E),
        ret.retention_masked,
        CHUNKWISE,
        {"heads": HEADS, "scale": 0.7},
    ),
    "gated": Case(
        "gated_linear_attention",
        lambda B, T, strong: (*qkv(B, T), decays(strong, B, T, HEADS * D)),
        gla.gated_linear_attention_step,
        zeros(HEADS, D, E),
        gla.gated_linear_attention_masked,
        2 * PADDED * HEADS * (65 * (D + E) // 2 + 2 * D * E),
        {"heads": HEADS, "scale": 0.7},
    ),
    "delta": Case(
        "delta_rule",
        lambda B, T, strong: (*unit_keys(B, T), torch.rand(B, T, HEADS, dtype=DOUBLE) * (2 if strong else 1)),
        delta.delta_rule_step,
        zeros(HEADS, D, E),
        delta.delta_rule_masked,
        PADDED * HEADS * (4 * 64 * D + 64 * (D + E) + 2 * 64 * E + 6 * D * E),
        {"heads": HEADS, "scale": 0.7},
    ),
    "ssd": Case(
        "ssd",
        lambda B, T, strong: space(B, T, strong, 4 * E, 4, 4),
        duality.ssd_step,
        zeros(4, 3, E),
        duality.ssd_masked,
        2 * PADDED * (2 * 64 * 3 + 4 * (64 * E + 2 * 3 * E)),
        {"heads": 4, "groups": 2},
    ),
    "ssd, one group": Case(
        "ssd",
        lambda B, T, strong: space(B, T, strong, 2 * E, 2, 2)[:5],
        duality.ssd_step,
        zeros(2, 6, E),
        duality.ssd_masked,
        2 * PADDED * (64 * 6 + 2 * (64 * E + 2 * 6 * E)),
        {"heads": 2},
    ),
    "selective scan": Case(
        "selective_scan",
        lambda B, T, strong: space(B, T, strong, E, E, E, 3),
        scan.selective_scan_step,
        zeros(E, 3),
        scan.selective_scan_masked,
        7 * 2 * 5 * E * 3,
    ),
    "rwkv": Case(
        "rwkv",
        lambda B, T, strong: (randn(B, T, E) * (200 if strong else 1), randn(B, T, E), decays(strong, E), randn(E)),
        wkv.rwkv_step,
        lambda arguments: wkv.rwkv_start(arguments[0][:, 0]),
        wkv.rwkv_masked,
        37 * 2 * 5 * E,
    ),
    "linear, elu": Case(
        "linear_attention",
        lambda B, T, strong: qkv(B, T),
        linear.linear_attention_step,
        zeros(HEADS, D, E + 1),
        linear.linear_attention_masked,
        CHUNKWISE,
        {"heads": HEADS, "causal": True},
    ),
    "linear, given": Case(
        "linear_attention",
        lambda B, T, strong: tuple(x.abs() for x in qkv(B, T)),
        linear.linear_attention_step,
        zeros(HEADS, D, E + 1),
        linear.linear_attention_masked,
        CHUNKWISE,
        {"heads": HEADS, "causal": True, "feature": "given"},
    ),
    "linear, no sum": Case(
        "linear_attention",
        lambda B, T, strong: qkv(B, T),
        linear.linear_attention_step,
        zeros(HEADS, D, E),
        linear.linear_attention_masked,
        CHUNKWISE,
        {"heads": HEADS, "causal": True, "normalize": False},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# one case each, where another would say nothing new
every_operator = pytest.mark.parametrize("case", {c.name: c for c in CASES.values()}.values(), ids=lambda c: c.name)


def by_steps(case: Case, arguments: Tensors) -> torch.Tensor:
    """One token after the other; the options of a step are the operator's, but that it is causal anyway."""
    options = {name: value for name, value in case.options.items() if name != "causal"}
    state = case.initial(arguments)
    outputs = []
    for t in range(arguments[0].shape[1]):
        token = [x[:, t] if x.dim() == 3 else x for x in arguments]
        state, output = case.step(state, *token, **options)
        outputs.append(output)
    return torch.stack(outputs, 1)


@every_case
@pytest.mark.parametrize("strong", [False, True], ids=["mild", "strong"])
@pytest.mark.parametrize(("T", "chunk"), [(1, 4), (4, 4), (11, 4), (37, 16), (70, 64)])
def test_three_forms_of_one_function(case: Case, T: int, chunk: int, strong: bool) -> None:
    arguments = case.inputs(2, T, strong)
    expected = by_steps(case, arguments)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(case.operator.reference(*arguments, **case.options, chunk=chunk), expected, **CLOSE)
    torch.testing.assert_close(case.operator.overload(*arguments, **case.options), expected, **CLOSE)
    if case.masked is not None:
        torch.testing.assert_close(case.masked(*arguments, **case.options), expected, **CLOSE)


@every_case
@pytest.mark.parametrize("strong", [False, True], ids=["mild", "strong"])
def test_float32_stays_close_over_many_chunks(case: Case, strong: bool) -> None:
    arguments = case.inputs(1, 300, strong)
    expected = case.operator.overload(*arguments, **case.options)
    found = case.operator.overload(*(x.float() for x in arguments), **case.options).double()
    assert float((found - expected).norm() / expected.norm()) < 5e-6


@every_case
def test_shape_rule_tells_the_real_shape(case: Case) -> None:
    arguments = case.inputs(2, 5, False)
    inferred = case.operator.infer(*arguments, **case.options)
    real = case.operator.reference(*arguments, **case.options)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (real.shape, real.dtype, real.stride())


@every_case
def test_cost_is_that_of_the_chunked_form(case: Case) -> None:
    assert case.operator.flops(*case.inputs(2, 5, False), **case.options) == case.flops


@every_operator
def test_torch_accepts_the_operator(case: Case) -> None:
    arguments = tuple(x.requires_grad_() for x in case.inputs(2, 5, False))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(case.operator.overload, arguments, case.options, test_utils=checks)


@pytest.mark.slow
@every_operator
def test_torch_traces_the_operator_and_its_gradient(case: Case) -> None:
    arguments = tuple(x.requires_grad_() for x in case.inputs(2, 5, False))
    torch.library.opcheck(case.operator.overload, arguments, case.options, test_utils="test_aot_dispatch_dynamic")


@every_case
@pytest.mark.parametrize("strong", [False, True], ids=["mild", "strong"])
def test_gradients_over_several_chunks(case: Case, strong: bool) -> None:
    arguments = tuple(x.requires_grad_() for x in case.inputs(1, 6, strong))
    assert torch.autograd.gradcheck(
        lambda *x: case.operator.reference(*x, **case.options, chunk=4), arguments, fast_mode=True
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_bidirectional_linear_attention(normalize: bool, masked: bool) -> None:
    q, k, v = randn(2, 4, HEADS * D), randn(2, 7, HEADS * D), randn(2, 7, HEADS * E)
    mask = torch.tensor([[True] * 5 + [False] * 2, [False] * 7]) if masked else None
    found = xf.linear_attention(q, k, v, mask, heads=HEADS, normalize=normalize)
    torch.testing.assert_close(
        found, linear.linear_attention_masked(q, k, v, mask, heads=HEADS, normalize=normalize), **CLOSE
    )
    if masked:
        assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert load_operators()["linear_attention"].flops(q, k, v, heads=HEADS) == 2 * 2 * HEADS * (4 + 7) * D * E


def test_causal_linear_attention_skips_padding() -> None:
    q, k, v = qkv(2, 9)
    mask = torch.arange(9).repeat(2, 1) >= 3
    found = linear.linear_attention(q, k, v, mask, heads=HEADS, causal=True, chunk=4)
    torch.testing.assert_close(found, linear.linear_attention_masked(q, k, v, mask, heads=HEADS, causal=True), **CLOSE)
    assert torch.equal(found[:, :3], torch.zeros(2, 3, HEADS * E, dtype=DOUBLE))
    alone = xf.linear_attention(q[:, 3:], k[:, 3:], v[:, 3:], heads=HEADS, causal=True)
    torch.testing.assert_close(found[:, 3:], alone, **CLOSE)


@pytest.mark.parametrize("cut", [1, 64])
def test_delta_rule_in_parts_is_the_whole(cut: int) -> None:
    arguments = CASES["delta"].inputs(2, 70, True)
    state = torch.zeros(2, HEADS, D, E, dtype=DOUBLE)
    first, between = xf.delta_rule_resumed(*(x[:, :cut] for x in arguments), state, heads=HEADS, scale=0.7)
    second, last = xf.delta_rule_resumed(*(x[:, cut:] for x in arguments), between, heads=HEADS, scale=0.7)
    whole, expected = xf.delta_rule_resumed(*arguments, state, heads=HEADS, scale=0.7)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **CLOSE)
    torch.testing.assert_close(last, expected, **CLOSE)
    torch.testing.assert_close(whole, xf.delta_rule(*arguments, heads=HEADS, scale=0.7), **CLOSE)


def test_torch_accepts_the_delta_rule_from_a_state() -> None:
    arguments = (*CASES["delta"].inputs(2, 5, False), randn(2, HEADS, D, E))
    operator, options = load_operators()["delta_rule_resumed"], {"heads": HEADS, "scale": 0.7}
    given = tuple(x.requires_grad_() for x in arguments)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.overload, given, options, test_utils=checks)
    assert torch.autograd.gradcheck(lambda *x: operator.overload(*x, **options), given, fast_mode=True)
    assert operator.flops(*arguments, **options) == CASES["delta"].flops


@pytest.mark.parametrize("T", [1, 2, 70])
@pytest.mark.parametrize("strong", [False, True], ids=["mild", "strong"])
def test_rwkv_in_both_directions(T: int, strong: bool) -> None:
    arguments = CASES["rwkv"].inputs(2, T, strong)
    found = xf.rwkv(*arguments, bidirectional=True)
    torch.testing.assert_close(found, wkv.rwkv_masked(*arguments, bidirectional=True), **CLOSE)
    torch.testing.assert_close(
        found, xf.rwkv(*(x.flip(1) if x.dim() == 3 else x for x in arguments), bidirectional=True).flip(1), **CLOSE
    )
    if not strong:
        k, v, log_decay, bonus = arguments
        weights = [
            [(k[:, i] + (bonus if i == t else (abs(t - i) - 1) * log_decay)).exp() for i in range(T)] for t in range(T)
        ]
        means = [sum(w * v[:, i] for i, w in enumerate(row)) / sum(row) for row in weights]
        torch.testing.assert_close(found, torch.stack(means, 1), **CLOSE)
    assert load_operators()["rwkv"].flops(*arguments, bidirectional=True) == 73 * 2 * T * E


@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_that_is_not_causal_has_one_state(groups: int) -> None:
    T, heads = 7, 4
    x, dt, a, b, c, d = space(2, T, False, heads * E, heads, heads)
    found = xf.ssd(x, dt, a, b, c, d, heads=heads, groups=groups, causal=False)
    expected = torch.zeros_like(found).unflatten(-1, (heads, E))
    N = 6 // groups
    for h in range(heads):
        part = slice(h * groups // heads * N, (h * groups // heads + 1) * N)
        inputs = x.unflatten(-1, (heads, E))[:, :, h]
        for i in range(T):
            for j in range(T):
                weight = (c[:, i, part] * b[:, j, part]).sum(-1) * dt[:, j, h] * a[h].abs()
                expected[:, i, h] += weight[:, None] * inputs[:, j]
            expected[:, i, h] += d[h] * inputs[:, i]
    torch.testing.assert_close(found, expected.flatten(2), **CLOSE)
    operator, options = load_operators()["ssd"], {"heads": heads, "groups": groups, "causal": False}
    assert operator.flops(x, dt, a, b, c, d, **options) == 4 * 2 * T * heads * N * E
    given = tuple(value.requires_grad_() for value in (x, dt, a, b, c, d))
    assert torch.autograd.gradcheck(lambda *v: operator.overload(*v, **options), given, fast_mode=True)


def fake(*shapes: tuple[int, ...]) -> Tensors:
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xf.retention(*fake((1, 5, 6), (1, 5, 4), (1, 5, 6), (2,)), heads=2), "disagree on the head width"),
        (lambda: xf.retention(*fake((1, 5, 6), (1, 5, 6), (1, 5, 6), (3,)), heads=2), "not one decay for each head"),
        (
            lambda: xf.gated_linear_attention(*fake((1, 5, 6), (1, 5, 6), (1, 5, 6), (1, 5, 2)), heads=2),
            "not one gate for each channel",
        ),
        (
            lambda: xf.delta_rule(*fake((1, 5, 6), (1, 5, 6), (1, 5, 6), (1, 5, 6)), heads=2),
            "not one beta for each head",
        ),
        (
            lambda: xf.delta_rule_resumed(*fake(*[(1, 5, 6)] * 3, (1, 5, 2), (1, 2, 3, 4)), heads=2),
            "the state is not one matrix",
        ),
        (
            lambda: xf.ssd(*fake((1, 5, 6), (1, 5, 3), (2,), (1, 5, 4), (1, 5, 4)), heads=2),
            "not one step size for each head",
        ),
        (
            lambda: xf.selective_scan(*fake((1, 5, 6), (1, 5, 6), (6, 3), (1, 5, 4), (1, 5, 4))),
            "disagree on the size of a state",
        ),
        (lambda: xf.rwkv(*fake((1, 5, 6), (1, 5, 6), (6,), (5,))), "a channel has no decay or no bonus"),
        (
            lambda: xf.linear_attention(*fake((1, 5, 6), (1, 7, 6), (1, 7, 6)), heads=2, causal=True),
            "one key for each query",
        ),
        (
            lambda: xf.linear_attention(*fake((1, 5, 6), (1, 5, 6), (1, 5, 6)), heads=2, feature="positive"),
            "feature 'positive' has a projection",
        ),
        (
            lambda: xf.linear_attention(*fake((1, 5, 6), (1, 5, 6), (1, 5, 6)), None, *fake((2, 3, 4)), heads=2),
            "feature 'elu' has no projection",
        ),
        (
            lambda: xf.linear_attention(
                *fake((1, 5, 6), (1, 5, 6), (1, 5, 6)), None, *fake((2, 4, 4)), heads=2, feature="hedgehog"
            ),
            "disagree on the heads or their width",
        ),
        (
            lambda: xf.linear_attention(*fake((1, 5, 6), (1, 5, 6), (1, 5, 6)), heads=2, feature="exp"),
            "feature 'exp' is not one of elu, given, positive, hedgehog",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
