"""State-space layers: groups by numpy, permutations that change nothing, and Mamba models quantized on the target."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch

import xformopt as xo
from xformopt.errors import DataError, UsageError
from xformopt.lowering import lower
from xformopt.models.mamba import Mamba, Mamba2, Mamba2Config, MambaConfig
from xformopt.passes import parse_pass
from xformopt.passes.quantize.quantize_state_space import hadamard
from xformopt.passes.quantize.support.state_groups import cluster_profiles, contiguous_segments, group_channels
from xformopt.pipeline import Context, Pipeline, PipelineResult
from xformopt.program import Program
from xformopt.program.text import target_name


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@cache
def mamba(kind: str) -> Program:
    """A small model whose channels differ in size, lifted by the exact passes."""
    torch.manual_seed(7)
    if kind == "mamba2":
        config = Mamba2Config(vocabulary=40, width=32, layers=1, heads=8, groups=2, state=8)
        model: torch.nn.Module = Mamba2(config)
    else:
        model = Mamba(MambaConfig(vocabulary=40, width=32, layers=1, state=8, rank=4))
    for name, parameter in model.named_parameters():
        if name.endswith("layer.input.weight"):
            spread = torch.exp(torch.randn(len(parameter), 1, generator=torch.Generator().manual_seed(3)))
            parameter.data *= spread
        parameter.requires_grad_(False)
    return Pipeline.recipe("exact").run(xo.capture(model.eval())).program


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(40, (2, 21))} for _ in range(2)]


def run(kind: str, text: str, batches: list[dict[str, torch.Tensor]]) -> PipelineResult:
    return Pipeline([parse_pass(part) for part in text.split("; ")]).run(mamba(kind), batches)


def operators(program: Program) -> list[str]:
    return [target_name(node.target) for node in program.nodes()]


def scan_input(program: Program, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from xformopt.program import interpret

    seen = []

    def observe(node: torch.fx.Node, value: object) -> None:
        if any(target_name(user.target) == "xf.ssd" and user.args[0] is node for user in node.users):
            assert isinstance(value, torch.Tensor)
            seen.append(value)

    interpret(program, batch, observe=observe)
    return seen[0]


def test_sorting_changes_nothing_but_the_order(batches: list[dict[str, torch.Tensor]]) -> None:
    result = run("mamba2", "sort-state-channels; sort-state-channels", batches)
    first, again = result.history[-2:]
    assert first.changed
    assert first.local_l2 < 1e-6
    assert first.relative_l2 < 1e-6
    assert not again.changed
    maxima = torch.cat([scan_input(result.program, batch).abs().flatten(0, 1) for batch in batches]).amax(0)
    before = torch.cat([scan_input(mamba("mamba2"), batch).abs().flatten(0, 1) for batch in batches]).amax(0)
    per_head = maxima.reshape(8, 8)
    assert bool((per_head.diff(dim=1) <= 0).all()), "channels fall inside each head"
    # heads stay among those that share what writes and reads the states
    for half in (slice(0, 4), slice(4, 8)):
        wanted = sorted(np.sort(row).tolist() for row in before.reshape(8, 8)[half].numpy())
        found = sorted(np.sort(row).tolist() for row in per_head[half].numpy())
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mamba2", "mamba"])
@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_quantized_layers_run_on_the_target(kind: str, bits: int, batches: list[dict[str, torch.Tensor]]) -> None:
    result = run(kind, f"sort-state-channels; quantize-state-space{{weight_bits={bits},group=16}}", batches)
    record = result.history[-1]
    assert 0 < record.relative_l2 < (0.05 if bits == 8 else 0.25)
    names = operators(result.program)
    layers = 4 if kind == "mamba2" else 7
    rounded = 3 if kind == "mamba2" else 1
    kinds = ("xf.quantized_linear", "xf.weight_only_linear")
    if bits == 8:
        assert [names.count(name) for name in kinds] == [layers, 0]
        assert names.count("xf.fake_quantize") == rounded
    else:
        assert names.count("xf.weight_only_linear") > 2
    artifact = lower(result.program, measure=False)
    assert artifact.manifest.execution["linear layers in float"] >= 2, "the rotation and the head"
    found = artifact.run(input_ids=batches[0]["input_ids"].numpy())["logits"]
    wanted = result.program.run(batches[0])["logits"]
    assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) < 1e-2


def test_scales_belong_to_groups(batches: list[dict[str, torch.Tensor]]) -> None:
    program = run("mamba2", "quantize-state-space{head_groups=2,channel_groups=3}", batches).program
    scales = {
        name.rsplit(".", 2)[1]: value
        for name, value in program.parameters.items()
        if ".layer." in name and name.endswith((".x.scale", ".b.scale", ".c.scale"))
    }
    maxima = torch.cat([scan_input(mamba("mamba2"), batch).abs().flatten(0, 1) for batch in batches]).amax(0)
    assert len(scales["x"].unique()) <= 6
    assert bool((scales["x"] * 127 >= maxima * (1 - 1e-6)).all()), "nothing is clipped"
    # one scale for each of the two state groups
    for role in ("b", "c"):
        assert len(scales[role].reshape(2, 8)[0].unique()) == len(scales[role].reshape(2, 8)[1].unique()) == 1


def test_turning_alone_changes_nothing(batches: list[dict[str, torch.Tensor]]) -> None:
    matrix = hadamard(24)
    np.testing.assert_allclose((matrix @ matrix.t()).numpy(), np.eye(24), atol=1e-12)
    assert float(matrix[:8, 8:].abs().max()) == 0
    np.testing.assert_allclose(matrix.abs().unique().numpy(), [0, 8**-0.5])
    assert len(hadamard(9)) == 1
    everything = run("mamba2", "quantize-state-space{skip=[*input*,*gate*,*step*]}", batches)
    assert "xf.quantized_linear" in operators(everything.program)
    assert any(name.startswith("hadamard.") for name in everything.program.parameters)


def test_segments_are_the_best_contiguous_ones() -> None:
    values = torch.rand(9).sort(descending=True).values.tolist()

    def deviation(cuts: tuple[int, ...]) -> float:
        parts = np.split(np.array(values), cuts)
        return float(sum(((part - part.mean()) ** 2).sum() for part in parts))

    found = contiguous_segments(values, 3)
    cuts = tuple(i for i in range(1, 9) if found[i] != found[i - 1])
    assert deviation(cuts) == pytest.approx(min(deviation(c) for c in itertools.combinations(range(1, 9), 2)))
    assert contiguous_segments([3.0, 2.0], 4) == [0, 1]


def test_heads_of_like_profile_share_a_group() -> None:
    profiles = torch.tensor([[1, 0.9], [1, 0.1], [1, 0.8], [1, 0.15], [1, 0.5]])
    assert cluster_profiles(profiles, 3) == [0, 1, 0, 1, 2]
    maxima = torch.tensor([1.0, 9.0, 8.0, 0.5, 3.0, 0.1])
    groups = group_channels(maxima, heads=2, head_groups=1, channel_groups=2)
    assert groups.order.tolist() == [[1, 2, 0], [1, 0, 2]]
    # the largest of each place are 9, 8 and 1
    assert groups.per_channel().tolist() == [1 / 127, 9 / 127, 9 / 127, 9 / 127, 9 / 127, 1 / 127]


def test_what_is_refused(batches: list[dict[str, torch.Tensor]]) -> None:
    for text in ("sort-state-channels", "quantize-state-space"):
        with pytest.raises(DataError, match="--calibration"):
            parse_pass(text).run(mamba("mamba2"), Context())
    sorting = parse_pass("sort-state-channels").run(mamba("mamba"), Context(calibration=batches))
    assert [refusal.reason for refusal in sorting.rejected] == ["Mamba-1 has no heads to sort channels in"]
    plain = Program.parse('program "m" lifted\ninput %x: f32[2,4]\n%y: f32[2,4] = aten.neg.default(%x)\nreturn y=%y\n')
    assert "no state-space layer" in parse_pass("quantize-state-space").run(plain, Context()).notes[0]
    for text, message in (
        ("quantize-state-space{weight_bits=5}", "weight_bits must be 4 or 8"),
        ("quantize-state-space{percentile=10}", "percentile must lie in"),
        ("quantize-state-space{group=10}", "group must be 16"),
        ("sort-state-channels{head_groups=0}", "at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_pass(text)
