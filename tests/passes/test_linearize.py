"""Linearized attention: formulas by loops over tokens, the gate of lengths, the fit, what is refused, the artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import xformopt as xo
from xformopt.errors import DataError, UsageError
from xformopt.models.llama import Llama, LlamaConfig
from xformopt.models.t5 import T5Config, T5Encoder
from xformopt.models.vit import ViT, ViTConfig
from xformopt.passes import build_pass, parse_pass
from xformopt.passes.linearize.support.crossover import crossing
from xformopt.pipeline import Context, PassResult, Pipeline
from xformopt.program import Program
from xformopt.program.text import target_name

Batch = dict[str, torch.Tensor]
T, D, HEADS = 80, 4, 2


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def llama() -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(vocabulary=32, length=128, width=16, depth=1, heads=4, kv_heads=2, hidden=16)
    module = Llama(config).eval()
    return Pipeline([]).run(xo.capture(module, {"input_ids": torch.randint(0, 32, (2, 100))})).program


@pytest.fixture(scope="module")
def vit() -> Program:
    torch.manual_seed(0)
    config = ViTConfig(image_size=36, in_channels=1, patch=4, width=16, depth=1, heads=2, mlp_ratio=1, classes=4)
    return Pipeline([]).run(xo.capture(ViT(config).eval(), {"pixel_values": torch.randn(2, 1, 36, 36)})).program


def run(name: str, program: Program, batches: list[Batch], **options: Any) -> PassResult:
    return build_pass(name, options).run(program, Context(calibration=batches))


def tokens(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 32, (2, 100), generator=generator)} for _ in range(count)]


def images(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(3, 1, 36, 36, generator=generator)} for _ in range(count)]


def lone(causal: bool, masked: bool = False, extra: str = "") -> Program:
    mask = f"input %padding_mask: bool[batch,{T}]\n" if masked else ""
    width = HEADS * D
    return Program.parse(
        'program "m" lifted\ndim batch in [1, inf]\n'
        + "".join(f"input %{name}: f32[batch,{T},{width}]\n" for name in "qkv")
        + mask
        + f"%y: f32[batch,{T},{width}] = xf.attention(%q, %k, %v{', %padding_mask' if masked else ''}) "
        f"{{heads={HEADS}, kv_heads={HEADS}, scale=0.5{', causal=true' if causal else ''}{extra}}}\nreturn y=%y\n"
    )


def drawn(masked: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(5)
    found = {name: torch.randn(2, T, HEADS * D, generator=generator) for name in "qkv"}
    if masked:
        found["padding_mask"] = torch.ones(2, T, dtype=torch.bool)
        found["padding_mask"][1, 60:] = False
    return found


def heads_of(batch: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys, values and which exist, of each sequence and head, float64."""
    exists = batch.get("padding_mask", torch.ones(2, T, dtype=torch.bool))
    return [
        (*(batch[name][b, :, h * D : (h + 1) * D].double() for name in "qkv"), exists[b])
        for b in range(2)
        for h in range(HEADS)
    ]


def joined(heads: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.cat(heads[b * HEADS : (b + 1) * HEADS], -1) for b in range(2)])


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exists: torch.Tensor, target: str) -> torch.Tensor:
    state, outputs = torch.zeros(D, D, dtype=torch.float64), []
    for t in range(T):
        if exists[t] and target == "gla":
            state = torch.sigmoid(k[t]).pow(1 / 16)[:, None] * state + torch.outer(k[t].softmax(0), v[t])
        elif exists[t]:
            unit, strength = k[t] / k[t].norm(), torch.sigmoid(k[t].mean())
            state = state + strength * torch.outer(unit, v[t] - unit @ state)
        outputs.append(q[t].softmax(0) @ state)
    return torch.stack(outputs)


def near(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exists: torch.Tensor, causal: bool) -> torch.Tensor:
    distance = torch.arange(T) - torch.arange(T)[:, None]
    visible = (distance.abs() < 20) & exists & ((distance <= 0) if causal else True)
    logits = (q @ k.T * 0.5).masked_fill(~visible, -math.inf)
    return logits.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("target", ["gla", "delta-rule"])
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, True)])
def test_liger_is_half_a_recurrence_and_half_a_window(target: str, causal: bool, masked: bool) -> None:
    batch = drawn(masked)
    options = {"force": True, "target": target, "window": 20, "max_error": 99.0}
    result = run("linearize-liger", lone(causal, masked), [batch], **options)
    control = run("linearize-liger", lone(causal, masked), [batch], **options, window_only=True)
    wanted, windows = [], []
    for q, k, v, exists in heads_of(batch):
        far = recurrence(q, k, v, exists, target)
        if not causal:
            turned = (x.flip(0) for x in (q, k, v, exists))
            far = (far + recurrence(*turned, target).flip(0)) / 2  # type: ignore[call-arg]
        windows.append(near(q, k, v, exists, causal))
        wanted.append((far + windows[-1]) / 2)
    valid = batch.get("padding_mask", torch.ones(2, T, dtype=torch.bool))
    assert relative(result.program.run(batch)["y"][valid], joined(wanted)[valid]) < 1e-5
    assert relative(control.program.run(batch)["y"][valid], joined(windows)[valid]) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_learned_maps_come_closer_to_attention(causal: bool) -> None:
    batch = drawn()
    program = lone(causal)
    attention = program.run(batch)["y"]
    few = run("linearize-learned-maps", program, [batch], force=True, iterations=1, rate=1e-9, max_error=99.0)
    many = run("linearize-learned-maps", program, [batch], force=True, iterations=80, max_error=99.0)
    (maps,) = (value for name, value in few.program.parameters.items() if "feature_map" in name)
    heads = []
    for index, (q, k, v, _) in enumerate(heads_of(batch)):
        w = maps[index % HEADS].double()
        x, y = (torch.cat(((p @ w).softmax(-1), (-p @ w).softmax(-1)), -1) for p in (q, k))
        weights = x @ y.T
        weights = weights.tril() if causal else weights
        heads.append(weights @ v / weights.sum(-1, keepdim=True))
    untrained = few.program.run(batch)["y"]
    assert relative(untrained, joined(heads)) < 1e-4
    trained = relative(many.program.run(batch)["y"], attention)
    assert trained < 0.9 * relative(untrained, attention)
    # what the notes say of the error is what a run shows
    error = float(many.notes[-1].rsplit(" ", 1)[1])
    assert error == pytest.approx(trained**2, abs=2e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_flow_gets_projections_of_its_own(fused: bool, vit: Program) -> None:
    vit = parse_pass("fuse-qkv").run(vit, Context()).program if fused else vit
    errors = []
    for fit in (False, True):
        result = run("linearize-flow", vit, images(), force=True, fit=fit, iterations=40, max_error=99.0)
        errors.append(float(result.notes[-1].rsplit(" ", 1)[1]))
        assert any(name.endswith(".q.weight") for name in result.program.parameters) == fit
        # what is not read any more is gone
        fewer = 4 if fused and fit else 0
        assert len(result.program.parameters) == len(vit.parameters) + fewer
    assert errors[1] < 0.8 * errors[0]


ON_TARGET = [
    ("llama", "linearize-liger{force=true,window=32,max_error=9}", {"gated_linear_attention", "local_attention"}),
    ("vit", "linearize-flow{force=true,iterations=5,max_error=9}", {"flow_attention"}),
]
MORE_ON_TARGET = [
    ("llama", "linearize-learned-maps{force=true,iterations=5,max_error=9}", {"linear_attention"}),
    (
        "llama",
        "linearize-learned-maps{force=true,iterations=5,max_error=9,window=32}",
        {"windowed_linear_attention"},
    ),
    (
        "vit",
        "linearize-learned-maps{force=true,iterations=5,max_error=9,window=20}",
        {"windowed_linear_attention"},
    ),
    ("vit", "linearize-liger{force=true,window=32,max_error=9}", {"gated_linear_attention", "local_attention"}),
]


@pytest.mark.parametrize(
    ("model", "text", "names"), [*ON_TARGET, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_ON_TARGET)]
)
def test_the_artifact_runs(model: str, text: str, names: set[str], request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(model)
    (batch,) = tokens(1) if model == "llama" else images(1)
    result = Pipeline([parse_pass(text)]).run(program, calibration=[batch])
    found = {target_name(node.target) for node in result.program.nodes()}
    assert {f"xf.{name}" for name in names} <= found
    assert "xf.attention" not in found
    shorter = {"input_ids": batch["input_ids"][:1, :77]} if model == "llama" else batch
    artifact = xo.lower(result.program, "ort-cpu", measure=False)
    have = artifact.run(**{name: value.numpy() for name, value in shorter.items()})["logits"]
    assert relative(torch.from_numpy(have), result.program.run(shorter)["logits"]) < 1e-4


def clock(crossover: float) -> Any:
    """A clock by which softmax attention is slower beyond a length."""

    def time(programs: Mapping[str, Program]) -> dict[str, float]:
        return {
            name: (int(name.split()[1]) / crossover) ** 2
            if name.startswith("softmax")
            else int(name.split()[1]) / crossover
            for name in programs
        }

    return time


@pytest.mark.parametrize("name", ["linearize-liger", "linearize-learned-maps", "linearize-flow"])
def test_only_beyond_the_measured_crossover(name: str, llama: Program) -> None:
    fitted = {} if name == "linearize-liger" else {"iterations": 1}
    chosen = build_pass(name, {"max_error": 99.0, **fitted})
    stays = chosen.run(llama, Context(calibration=tokens(1), time=clock(150)))
    assert not stays.changed
    assert stays.rejected[0].reason == (
        "its sequences of 100 tokens are not longer than the crossover at 150 (measured on ort-cpu)"
    )
    assert "150 tokens" in stays.notes[0]
    assert chosen.run(llama, Context(calibration=tokens(1), time=clock(90))).changed


def test_a_crossover_is_interpolated() -> None:
    lengths = [64, 128, 256]
    assert crossing(lengths, [1, 4, 16], [2, 4, 8]) == pytest.approx(128)
    assert crossing(lengths, [1, 4, 16], [3, 6, 12]) == pytest.approx(192, rel=1e-6)
    assert crossing(lengths, [5, 9, 16], [4, 8, 15]) == 0
    # faster in the middle only
    assert crossing(lengths, [1, 9, 16], [2, 8, 17]) == math.inf


def test_a_bias_is_dropped_only_when_asked() -> None:
    torch.manual_seed(0)
    module = T5Encoder(T5Config(vocabulary=16, width=8, depth=1, heads=2, head_width=4, hidden=8)).eval()
    batch = {"input_ids": torch.randint(0, 16, (2, 90)), "attention_mask": torch.ones(2, 90, dtype=torch.int64)}
    batch["attention_mask"][1, 70:] = 0
    program = Pipeline([]).run(xo.capture(module, batch)).program
    for name in ("linearize-liger", "linearize-learned-maps", "linearize-flow"):
        options = {"force": True, "max_error": 99.0, **({} if name == "linearize-liger" else {"iterations": 1})}
        stays = run(name, program, [batch], **options)
        assert not stays.changed
        assert "an additive bias of the logits" in stays.rejected[0].reason
        changed = run(name, program, [batch], **options, bias="drop").program
        # padding has no part in what the others get
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][1, 70:] = 3
        one, two = (changed.run(inputs)["hidden"][1, :70] for inputs in (batch, other))
        assert torch.allclose(one, two, atol=1e-5)


def test_without_calibration_data(llama: Program) -> None:
    for name in ("linearize-liger", "linearize-learned-maps", "linearize-flow"):
        with pytest.raises(DataError, match="fitted and judged on calibration data"):
            build_pass(name, {"force": True}).run(llama, Context())


@pytest.mark.parametrize(
    "text",
    [
        "linearize-liger{window=0}",
        "linearize-liger{max_error=0}",
        "linearize-liger{target=rwkv}",
        "linearize-flow{rate=0}",
        "linearize-flow{iterations=0}",
        "linearize-learned-maps{bias=keep}",
        "linearize-learned-maps{window=-1}",
    ],
)
def test_options_are_checked(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pass(text)


@pytest.mark.parametrize(
    ("name", "options"), [("linearize-liger", {}), ("linearize-learned-maps", {"window": 64, "iterations": 1})]
)
def test_the_longest_input_decides_what_a_form_can_do_and_the_usual_one_what_pays(
    name: str, options: dict[str, object]
) -> None:
    program = Program.parse(
        'program "m" lifted\ndim batch in [1, inf]\ndim length in [1, 512]\n'
        "input %x: f32[batch,length,8]\n"
        "%y: f32[batch,length,8] = xf.attention(%x, %x, %x) {heads=2, kv_heads=2, scale=0.5}\nreturn y=%y\n"
    )
    short, long = ({"x": torch.randn(2, length, 8)} for length in (30, 100))
    options = {**options, "force": True, "max_error": 99.0}
    assert run(name, program, [short, short, long], **options).changed
    refused = run(name, program, [short, short], **options)
    assert "30 tokens lie within one window" in refused.rejected[0].reason
