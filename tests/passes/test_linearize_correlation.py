"""Spatial-channel correlation in the place of window attention: the formula by loops, the fit, the artifact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xformopt as xo
from xformopt.analysis import cost
from xformopt.errors import UsageError
from xformopt.lowering import lower
from xformopt.match import operand
from xformopt.models.swin import Swin, SwinConfig
from xformopt.passes import build_pass
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program, interpret

HEADS, WIDTH, WINDOW = 2, 16, 4
T, HALF = WINDOW * WINDOW, WIDTH // 2
FIRST, SHIFTED = "layers.2.mixer.attention", "layers.3.mixer.attention"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def swin() -> Program:
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, in_channels=1, width=WIDTH, depths=(2,), heads=(HEADS,), window=WINDOW)
    module = Swin(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "query" in name or "key" in name or "value" in name:
                parameter.mul_(12)
    return Pipeline([]).run(xo.capture(module, {"pixel_values": torch.randn(2, 1, 16, 16)})).program


def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(4, 1, 16, 16, generator=generator)} for _ in range(2)]


def run(program: Program, **options: Any) -> PassResult:
    chosen = build_pass("linearize-correlation", {"force": True, "max_error": 99.0, **options})
    return chosen.run(program, Context(calibration=images()))


def errors(result: PassResult) -> list[float]:
    return [float(note.split("error ")[1]) for note in result.notes if ": error " in note]


def correlation(x: torch.Tensor, own: dict[str, torch.Tensor], side: int) -> torch.Tensor:
    """One window ``[T, C]``, pair by pair."""
    q, v = (x @ own[f"{role}.weight"].t() + own[f"{role}.bias"] for role in "qv")  # [T, C / 2]
    groups: list[list[int]] = [[] for _ in range(side * side)]
    for row in range(WINDOW):
        for column in range(WINDOW):
            each = WINDOW // side
            groups[row // each * side + column // each].append(row * WINDOW + column)
    pooled = torch.stack(
        [sum(own["shares"][place] * v[token] for place, token in enumerate(group)) for group in groups]
        if "shares" in own
        else [v[token] for (token,) in groups]
    )
    out = torch.zeros(T, WIDTH, dtype=x.dtype)
    d = HALF // HEADS
    for h in range(HEADS):
        part = slice(h * d, h * d + d)
        for i in range(T):
            for s in range(side * side):
                weight = q[i, part] @ pooled[s, part] / d + own["position"][0, h, i, s]
                out[i, part] += weight * pooled[s, part]
    for c in range(HALF):
        for other in range(HALF):
            out[:, HALF + c] += (q[:, c] @ v[:, other]) / T * v[:, other]
    return out @ own["mix"].t()


@pytest.mark.parametrize("base", [2, 4])
def test_it_is_the_formula_and_runs_on_the_target(swin: Program, base: int) -> None:
    result = run(swin, base=base, iterations=3)
    assert len(result.fired) == 1
    (reject,) = result.rejected
    assert reject.path == SHIFTED
    assert "hides pairs of tokens (of a shifted window)" in reject.reason
    mix = next(name for name in result.program.parameters if name.endswith(".mix"))
    given = images()[0]
    # what the layer of queries reads, and what the mix returns
    source = operand(reader_of(result.program, mix.replace(".mix", ".q.weight")))
    result_node = reader_of(result.program, mix)
    seen: dict[str, torch.Tensor] = {}

    def observe(node: torch.fx.Node, value: Any) -> None:
        if node in (source, result_node):
            seen[node.name] = value

    interpret(result.program, given, observe=observe)
    prefix = mix.removesuffix("mix")
    own = {
        name.removeprefix(prefix): value.double()
        for name, value in result.program.parameters.items()
        if name.startswith(prefix)
    }
    for window in (0, 5):
        expected = correlation(seen[source.name][window].double(), own, base)
        torch.testing.assert_close(seen[result_node.name][window].double(), expected, rtol=1e-3, atol=1e-4)
    artifact = lower(result.program, measure=False)
    found = artifact.run(**{name: value.numpy() for name, value in given.items()})["logits"]
    torch.testing.assert_close(torch.from_numpy(found), result.program.run(given)["logits"], rtol=1e-3, atol=1e-4)


def reader_of(program: Program, parameter: str) -> torch.fx.Node:
    (found,) = [
        n for n in program.nodes() if any(a.op == "get_attr" and a.target == parameter for a in n.all_input_nodes)
    ]
    return found


def test_the_fit_brings_it_close_and_without_it_is_the_control(swin: Program) -> None:
    (control,), (fitted,) = errors(run(swin, base=4, fit=False)), errors(run(swin, base=4, iterations=60, rate=0.01))
    assert fitted < 0.5 * control
    rejected = run(swin, base=4, fit=False, max_error=control / 2).rejected
    assert any("the error of its linear form is" in each.reason for each in rejected)


def windows_of(window: int) -> Program:
    config = SwinConfig(image_size=32, in_channels=1, patch=1, width=8, depths=(1,), heads=(2,), window=window)
    return Pipeline([]).run(xo.capture(Swin(config).eval(), {"pixel_values": torch.randn(2, 1, 32, 32)})).program


def test_groups_save_work_in_large_windows() -> None:
    program, batch = windows_of(16), {"pixel_values": torch.randn(2, 1, 32, 32)}
    # longer than the crossover by operations, so that no force is needed
    chosen = build_pass("linearize-correlation", {"base": 4, "fit": False, "max_error": 99.0})
    result = chosen.run(program, Context(calibration=[batch]))
    assert result.changed
    assert cost(result.program).flops < 0.5 * cost(program).flops
    # one window is the whole image
    whole = build_pass("linearize-correlation", {"force": True}).run(windows_of(32), Context())
    assert not whole.changed
    assert "whole sequences" in whole.rejected[0].reason


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="base must be at least 1"):
        build_pass("linearize-correlation", {"base": 0})
