"""Linear attention with a window of softmax: by its definition, and in all its forms."""

from __future__ import annotations

import math

import pytest
import torch

from xformopt.kernels.definition import load_operators, xf
from xformopt.kernels.features import feature_map
from xformopt.kernels.windowed_linear_attention import (
    Window,
    windowed_linear_attention_masked,
    windowed_linear_attention_step,
)

DOUBLE = torch.float64
HEADS, D, E, M = 2, 3, 5, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def arguments(T: int) -> dict[str, torch.Tensor]:
    shapes = {"q": (2, T, HEADS * D), "k": (2, T, HEADS * D), "v": (2, T, HEADS * E), "gain": (HEADS,)}
    given = {name: torch.randn(*shape, dtype=DOUBLE) for name, shape in shapes.items()}
    return {**given, "projection": torch.randn(HEADS, D, M, dtype=DOUBLE)}


def some_keys(T: int) -> torch.Tensor:
    """Return a mask with gaps, and a row without any key."""
    mask = torch.rand(2, T) < 0.7
    mask[1] = False
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 40])
def test_near_weights_are_exponentials_and_far_ones_products(causal: bool, window: int) -> None:
    given, mask = arguments(7), torch.tensor([[True, False, True, True, True, False, True], [False] * 7])
    found = xf.windowed_linear_attention(**given, key_mask=mask, heads=HEADS, scale=0.7, window=window, causal=causal)
    expected = torch.zeros_like(found)
    heads = {name: given[name].unflatten(2, (HEADS, -1)).transpose(1, 2) for name in "qkv"}
    phi = {name: feature_map(heads[name], "hedgehog", given["projection"]) for name in "qk"}
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(7)).tolist():
        weights = {}
        for j in range(i + 1 if causal else 7):
            if mask[b, j] and abs(i - j) < window:
                logit = 0.7 * float(heads["q"][b, h, i] @ heads["k"][b, h, j])
                weights[j] = math.exp(logit + float(given["gain"][h]))
            elif mask[b, j]:
                weights[j] = float(phi["q"][b, h, i] @ phi["k"][b, h, j])
        for j, weight in weights.items():
            share = weight / sum(weights.values())
            expected[b, i, h * E : (h + 1) * E] += share * heads["v"][b, h, j]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("T", [1, 15, 16, 33, 130])
@pytest.mark.parametrize("window", [1, 9, 16, 50])
def test_chunks_masks_and_steps_are_one_function(T: int, window: int) -> None:
    given, options = arguments(T), {"heads": HEADS, "scale": 0.7, "window": window}
    tokens = [given.pop(name) for name in "qkv"]
    past = Window(*(torch.zeros(2, HEADS, *sizes, dtype=DOUBLE) for sizes in ((2 * M, E + 1), (0, D), (0, E + 1))))
    outputs = []
    for t in range(T):
        past, output = windowed_linear_attention_step(past, *(x[:, t] for x in tokens), **given, **options)
        outputs.append(output)
        assert past.keys.shape[2] == min(t + 1, window)
    expected = torch.stack(outputs, 1)
    chunked = xf.windowed_linear_attention(*tokens, **given, **options, causal=True)
    torch.testing.assert_close(chunked, expected, **CLOSE)
    masked = windowed_linear_attention_masked(*tokens, **given, **options, causal=True)
    torch.testing.assert_close(masked, expected, **CLOSE)


@pytest.mark.parametrize("T", [5, 48, 130])
@pytest.mark.parametrize("causal", [True, False])
def test_both_directions_and_absent_keys(T: int, causal: bool) -> None:
    given, options = arguments(T), {"heads": HEADS, "scale": 0.7, "window": 9, "causal": causal}
    mask = some_keys(T)
    found = xf.windowed_linear_attention(**given, key_mask=mask, **options)
    torch.testing.assert_close(found, windowed_linear_attention_masked(**given, key_mask=mask, **options), **CLOSE)
    assert not found[1].any()


def test_a_window_of_all_keys_is_softmax_attention_whatever_the_logits() -> None:
    given = {name: value.float() for name, value in arguments(20).items()}
    options = {"heads": HEADS, "scale": 200.0, "causal": True}
    found = xf.windowed_linear_attention(**given, **options, window=20)
    expected = xf.attention(given["q"], given["k"], given["v"], **options, kv_heads=HEADS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_torch_accepts_the_operator() -> None:
    given = {name: value.requires_grad_() for name, value in arguments(20).items()}
    options = {"heads": HEADS, "scale": 0.7, "window": 5, "causal": True}
    operator = load_operators()["windowed_linear_attention"]
    values = (*(given[name] for name in ("q", "k", "v", "gain")), None, given["projection"])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.overload, values, options, test_utils=checks)

    def call(*x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = xf.windowed_linear_attention(*x[:4], None, x[4], **options)
        return result

    assert torch.autograd.gradcheck(call, tuple(value for value in values if value is not None), fast_mode=True)
    tokens, around, F = 2 * 32, 32, 2 * M
    projections = 2 * 2 * 2 * 20 * HEADS * D * M
    expected = projections + 2 * tokens * HEADS * (around * (D + F + E) + 2 * F * E)
    assert operator.flops(*values, **options) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": (1, 7, 6)}, "one key for each query"),
        ({"k": (1, 5, 8)}, "head width"),
        ({"gain": (3,)}, "one number for each head"),
        ({"projection": None}, "has a projection"),
        ({"projection": (2, 4, 4)}, "disagree on the heads"),
        ({"window": 0}, "at least one key"),
        ({"feature": "exp"}, "is not one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], said: str) -> None:
    given: dict[str, object] = {"q": (1, 5, 6), "k": (1, 5, 6), "v": (1, 5, 6), "gain": (2,), "projection": (2, 3, 4)}
    given = {**given, "window": 4, "feature": "hedgehog", **change}
    with torch._subclasses.FakeTensorMode():
        called = {name: torch.empty(x) if isinstance(x, tuple) else x for name, x in given.items()}
        with pytest.raises(RuntimeError, match=said):
            xf.windowed_linear_attention(**called, heads=2, scale=1.0)
