"""Every operator of the dialect: its definition against another formula, and what torch asks of an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from apart_operators import STRAIGHT_THROUGH, TESTED_APART

from xformopt.kernels.definition import Operator, find_operator, load_operators, xf

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """One use of an operator: arguments, another formula for the result, and its cost."""

    name: str
    arguments: Callable[[], tuple[torch.Tensor | None, ...]]
    formula: Callable[..., Any]
    flops: int
    options: dict[str, Any] = field(default_factory=dict)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def layer_norm(x: torch.Tensor, w: Any = None, b: Any = None, *, eps: float, groups: int = 1) -> torch.Tensor:
    parts = []
    for part in x.chunk(groups, -1):
        mean = sum(part.unbind(-1)) / part.shape[-1]
        spread = sum((c - mean) ** 2 for c in part.unbind(-1)) / part.shape[-1]
        scaled = (part - mean[..., None]) / (spread[..., None] + eps) ** 0.5
        parts.append(scaled * (1 if w is None else w) + (0 if b is None else b))
    return torch.cat(parts, -1)


def rms_norm(x: torch.Tensor, w: Any = None, *, eps: float, groups: int = 1) -> torch.Tensor:
    parts = []
    for part in x.chunk(groups, -1):
        size = sum(c**2 for c in part.unbind(-1)) / part.shape[-1]
        parts.append(part / (size[..., None] + eps) ** 0.5 * (1 if w is None else w))
    return torch.cat(parts, -1)


def elementwise(function: Callable[[float], float]) -> Callable[..., torch.Tensor]:
    def apply(x: torch.Tensor, *, function: str) -> torch.Tensor:
        return torch.tensor([formula(float(value)) for value in x.reshape(-1)], dtype=DOUBLE).view(x.shape)

    formula = function
    return apply


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_quick": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
}


def glu(gate: torch.Tensor, up: torch.Tensor, *, function: str) -> torch.Tensor:
    return elementwise(ACTIVATIONS[function])(gate, function=function) * up


def linear(x: torch.Tensor, w: torch.Tensor, b: Any = None) -> torch.Tensor:
    return torch.einsum("...i,oi->...o", x, w) + (0 if b is None else b)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, interleaved: bool) -> torch.Tensor:
    """Multiply each pair, as a complex number, by cos + i sin."""
    out = x.clone()
    width, half = x.shape[-1] // heads, cos.shape[-1]
    for h in range(heads):
        for i in range(half):
            one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            pair = torch.complex(x[..., h * width + one], x[..., h * width + two])
            turned = pair * torch.complex(cos[..., i], sin[..., i])
            out[..., h * width + one], out[..., h * width + two] = turned.real, turned.imag
    return out


def mean_pool(x: torch.Tensor, mask: torch.Tensor, *, eps: float) -> torch.Tensor:
    rows = []
    for tokens, keep in zip(x, mask, strict=True):
        kept = [token for token, k in zip(tokens, keep, strict=True) if k]
        rows.append(sum(kept) / len(kept) if kept else torch.zeros(x.shape[-1], dtype=DOUBLE))
    return torch.stack(rows)


def patches(image: torch.Tensor, w: torch.Tensor, b: Any = None) -> torch.Tensor:
    P, Q = w.shape[2:]
    tokens = [
        torch.einsum("bipq,cipq->bc", image[:, :, y : y + P, x : x + Q], w) + (0 if b is None else b)
        for y in range(0, image.shape[2] - P + 1, P)
        for x in range(0, image.shape[3] - Q + 1, Q)
    ]
    return torch.stack(tokens, 1)


def added(norm: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return lambda x, residual, *affine, eps: (norm(x + residual, *affine, eps=eps), x + residual)


def angles(batch: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    theta = torch.rand(batch, 5, half, dtype=DOUBLE) * 6
    return theta.cos(), theta.sin()


def eighths(*shape: int) -> torch.Tensor:
    """Activations that 8 bits hold exactly: eighths from -100/8 to 155/8, each of which occurs once."""
    codes = torch.randint(1, 255, shape)
    codes.view(-1)[:2] = torch.tensor([0, 255])
    return (codes - 100).to(DOUBLE) / 8


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def byte(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def integer_products(
    x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: Any = None, step: Any = None, zero: Any = None
) -> torch.Tensor:
    """Python's own integers, clipped to 0..255 where a range is given."""
    step, zero = (0.125, 100) if step is None else (float(step), int(zero))
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        codes = [min(max(round(value / step) + zero, 0), 255) - zero for value in row]
        rows.append([sum(c * v for c, v in zip(codes, column, strict=True)) for column in w.tolist()])
    total = torch.tensor(rows, dtype=DOUBLE).view(*x.shape[:-1], len(w)) * step * s
    return total + (0 if b is None else b)


def table_of(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Take codes out of bytes one at a time."""

    def code(row: list[int], index: int) -> int:
        return int.from_bytes(bytes(row), "little") >> bits * index & 2**bits - 1

    rows, width, groups = [], packed[0].numel() * 8 // bits, scale.shape[1]
    for r, row in enumerate(packed.flatten(1).tolist()):
        shifts = [2 ** (bits - 1) if zero is None else code(zero[r].tolist(), g) for g in range(groups)]
        places = [(i, i * groups // width) for i in range(width)]
        rows.append([(code(row, i) - shifts[g]) * float(scale[r, g]) for i, g in places])
    return torch.tensor(rows, dtype=scale.dtype)


def weight_only(
    x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, zero: Any = None, b: Any = None, *, bits: int
) -> torch.Tensor:
    return linear(x, table_of(w, s, zero, bits), b)


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]])
X = 2 * 5 * 6
CASES = [
    Case("linear", lambda: (randn(2, 5, 6), randn(7, 6), randn(7)), linear, 2 * X * 7),
    Case("linear", lambda: (randn(2, 5, 6), randn(7, 6)), linear, 2 * X * 7),
    Case("layer_norm", lambda: (randn(2, 5, 6), randn(6), randn(6)), layer_norm, 8 * X, {"eps": 1e-3}),
    Case("layer_norm", lambda: (randn(2, 5, 6), None, randn(6)), layer_norm, 8 * X, {"eps": 1e-3}),
    Case("layer_norm", lambda: (randn(2, 5, 6), randn(3)), layer_norm, 8 * X, {"eps": 1e-3, "groups": 2}),
    Case("rms_norm", lambda: (randn(2, 5, 6), randn(6)), rms_norm, 4 * X, {"eps": 1e-3}),
    Case("rms_norm", lambda: (randn(2, 5, 6),), rms_norm, 4 * X, {"eps": 1e-3}),
    Case("rms_norm", lambda: (randn(2, 5, 6), randn(2)), rms_norm, 4 * X, {"eps": 1e-3, "groups": 3}),
    *(
        Case("activation", lambda: (randn(2, 5, 6) * 3,), elementwise(f), X if n == "relu" else 8 * X, {"function": n})
        for n, f in ACTIVATIONS.items()
    ),
    *(Case("glu", lambda: (randn(2, 5, 6), randn(2, 5, 6)), glu, 9 * X, {"function": n}) for n in ACTIVATIONS),
    Case(
        "linear_activation",
        lambda: (randn(2, 5, 6), randn(7, 6), randn(7)),
        lambda x, w, b, function: elementwise(ACTIVATIONS[function])(linear(x, w, b), function=function),
        2 * X * 7 + 8 * 2 * 5 * 7,
        {"function": "gelu"},
    ),
    Case(
        "add_layer_norm",
        lambda: (randn(2, 5, 6), randn(2, 5, 6), randn(6), randn(6)),
        added(layer_norm),
        9 * X,
        {"eps": 1e-3},
    ),
    Case("add_rms_norm", lambda: (randn(2, 5, 6), randn(2, 5, 6), randn(6)), added(rms_norm), 5 * X, {"eps": 1e-3}),
    *(
        Case(
            "rope",
            lambda rows=rows, half=half: (randn(2, 5, 12), *angles(rows, half)),
            rope,
            3 * 2 * 5 * 2 * 2 * half,
            {"heads": 2, "interleaved": interleaved},
        )
        for rows in (1, 2)
        for half in (3, 2)
        for interleaved in (False, True)
    ),
    Case("mean_pool", lambda: (randn(2, 5, 6), MASK), mean_pool, 2 * X, {"eps": 1e-9}),
    Case("mean_pool", lambda: (randn(2, 5, 6), MASK * 0), mean_pool, 2 * X, {"eps": 1e-9}),
    # 7 x 11 pixels in patches of 2 x 3: three rows of three, one row and two columns dropped
    Case(
        "patch_embedding",
        lambda: (randn(2, 3, 7, 11), randn(4, 3, 2, 3), randn(4)),
        patches,
        2 * 2 * 9 * 4 * 3 * 2 * 3,
    ),
    Case("patch_embedding", lambda: (randn(1, 1, 4, 4), randn(5, 1, 2, 2)), patches, 2 * 4 * 5 * 4),
    Case("quantized_linear", lambda: (eighths(2, 5, 6), int8(7, 6), randn(7), randn(7)), integer_products, 2 * X * 7),
    Case("quantized_linear", lambda: (eighths(2, 1030), int8(3, 1030), randn(3)), integer_products, 4 * 1030 * 3),
    # a step of 1/16 from 90: what lies outside is clipped
    Case(
        "quantized_linear",
        lambda: (eighths(2, 5, 6), int8(7, 6), randn(7), None, torch.tensor(0.0625, dtype=DOUBLE), byte() % 90),
        integer_products,
        2 * X * 7,
    ),
    *(
        Case(
            "weight_only_linear",
            lambda bits=bits, zero=zero: (
                randn(2, 5, 24),
                byte(7, 3, bits),
                randn(7, 3),
                byte(7, -(-3 * bits // 8)) if zero else None,
                randn(7) if zero else None,
            ),
            weight_only,
            2 * 2 * 5 * 24 * 7,
            {"bits": bits},
        )
        for bits in (2, 3, 4, 6, 8)
        for zero in (False, True)
    ),
    *(
        Case(
            "quantized_embedding",
            lambda bits=bits, zero=zero: (
                byte(9, 3 * bits),
                torch.tensor([[3, 8, 0], [3, 1, 2]]),
                randn(9, 3),
                byte(9, -(-3 * bits // 8)) if zero else None,
            ),
            lambda w, ids, s, zero=None, *, bits: table_of(w, s, zero, bits)[ids],
            2 * 6 * 24,
            {"bits": bits},
        )
        for bits in (4, 8)
        for zero in (False, True)
    ),
]
IDS = [f"{case.name}-{number}" for number, case in enumerate(CASES)]


def operator(case: Case) -> Operator:
    return load_operators()[case.name]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_definition_is_the_formula(case: Case) -> None:
    arguments = case.arguments()
    torch.testing.assert_close(
        operator(case).reference(*arguments, **case.options),
        case.formula(*arguments, **case.options),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32_is_close_to_the_formula(case: Case) -> None:
    exact = case.arguments()
    rounded = tuple(a.float() if a is not None and a.is_floating_point() else a for a in exact)
    ours = operator(case).overload(*rounded, **case.options)
    widened = torch.utils._pytree.tree_map(lambda value: value.double(), ours)
    torch.testing.assert_close(widened, case.formula(*exact, **case.options), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_shape_rule_tells_the_real_shape(case: Case) -> None:
    arguments = case.arguments()
    inferred = operator(case).infer(*arguments, **case.options)
    real = operator(case).reference(*arguments, **case.options)
    for guess, value in zip(*(r if isinstance(r, tuple) else (r,) for r in (inferred, real)), strict=True):
        assert (guess.shape, guess.dtype) == (value.shape, value.dtype)
        assert guess.stride() == value.stride()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cost_is_the_formula_at_a_known_shape(case: Case) -> None:
    assert operator(case).flops(*case.arguments(), **case.options) == case.flops


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_torch_accepts_the_operator(case: Case) -> None:
    arguments = tuple(a.requires_grad_() if a is not None and a.is_floating_point() else a for a in case.arguments())
    torch.library.opcheck(operator(case).overload, arguments, case.options)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients(case: Case) -> None:
    if case.name in STRAIGHT_THROUGH:
        return
    arguments = case.arguments()
    positions = [i for i, a in enumerate(arguments) if a is not None and a.is_floating_point()]

    def call(*given: torch.Tensor) -> Any:
        filled = list(arguments)
        for position, value in zip(positions, given, strict=True):
            filled[position] = value
        return operator(case).overload(*filled, **case.options)

    inputs = [arguments[i].clone().requires_grad_() for i in positions]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_every_operator_has_a_case() -> None:
    assert {case.name for case in CASES} | TESTED_APART == set(load_operators())


def test_every_folder_defines_its_operator_once() -> None:
    folders = {path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/operator.py")}
    assert folders == set(load_operators())
    assert all((Path(__file__).parents[2] / "kernels" / name / "reference.py").exists() for name in folders)


def test_operators_are_found_by_name_and_by_target() -> None:
    assert xf.linear is torch.ops.xf.linear.default
    assert find_operator(xf.linear) is load_operators()["linear"]
    assert find_operator(torch.ops.aten.linear.default) is None
    assert find_operator("linear") is None
    with pytest.raises(AttributeError, match=r"there is no operator xf\.nothing"):
        _ = xf.nothing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xf.linear(*fake((2, 5), (3, 4))), "x and weight disagree on the input width"),
        (lambda: xf.layer_norm(*fake((2, 6), (4,)), eps=1e-5), "x and weight disagree on the width of a group"),
        (lambda: xf.rms_norm(*fake((2, 6), (6,)), eps=1e-5, groups=2), "disagree on the width of a group"),
        (lambda: xf.activation(*fake((2, 6)), function="swish"), "function 'swish' is not one of relu, gelu"),
        (lambda: xf.glu(*fake((2, 6), (2, 5)), function="silu"), "gate and up disagree on their width"),
        (lambda: xf.rope(*fake((2, 5, 8), (1, 5, 3), (1, 5, 3)), heads=2), "more features are rotated"),
        (lambda: xf.patch_embedding(*fake((1, 3, 4, 4), (5, 1, 2, 2))), "disagree on the channels"),
        (lambda: xf.linear_activation(*fake((2, 5), (3, 4)), function="relu"), "disagree on the input width"),
        (lambda: xf.quantized_linear(*fake((2, 5), (3, 4), (3,))), "disagree on the input width"),
        (lambda: xf.quantized_linear(*fake((2, 4), (3, 4), (4,))), "one number per output channel"),
        (lambda: xf.quantized_linear(*fake((2, 4), (3, 4), (3,))), "the weight must be int8"),
        (lambda: xf.weight_only_linear(*fake((2, 8), (3, 2, 4), (3, 2)), bits=4), "disagree on the input width"),
        (lambda: xf.weight_only_linear(*fake((2, 8), (3, 2, 4), (3, 1)), bits=8), "per output channel and group"),
        (lambda: xf.weight_only_linear(*fake((2, 8), (3, 2, 4), (3, 2)), bits=5), "2, 3, 4, 6 or 8 bits"),
        (lambda: xf.quantized_embedding(*fake((9, 8), (2,), (9, 3)), bits=8), "do not divide the width"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def fake(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Tensors without data, which only the shape rule sees."""
    return tuple(torch.empty(shape, device="meta") for shape in shapes)
