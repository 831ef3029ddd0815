"""Directions of outlier tokens against products of weights in numpy; planted defects are found, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xformopt.analysis.outlier_tokens import Defect, Opaque, outlier_tokens
from xformopt.capture import capture
from xformopt.errors import DataError, UsageError
from xformopt.passes import parse_pass
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program

WIDTH = 16
LINEAR = """
program "m" lifted
dim batch in [1, inf]
dim length in [1, inf]
input %x: f32[batch,length,16]
input %p: f32[batch,length,16]
param %q: f32[16,16]
param %v: f32[8,16]
param %o: f32[16,16]
param %up: f32[24,16]
param %up.b: f32[24]
param %down: f32[16,24]
%h: f32[batch,length,16] = aten.neg.default(%x)
%e: f32[batch,length,16] = aten.neg.default(%p)
%s: f32[batch,length,16] = aten.add.Tensor(%h, %e)  # embeddings
%lq: f32[batch,length,16] = xf.linear(%s, %q)
%lv: f32[batch,length,8] = xf.linear(%s, %v)
%a: f32[batch,length,16] = xf.attention(%lq, %lv, %lv) {heads=4, kv_heads=2, scale=0.5}
%lo: f32[batch,length,16] = xf.linear(%a, %o)
%t: f32[batch,length,16] = aten.add.Tensor(%s, %lo)  # attention
%u: f32[batch,length,24] = xf.linear(%t, %up, %up.b)
%d: f32[batch,length,16] = xf.linear(%u, %down)
%y: f32[batch,length,16] = aten.add.Tensor(%d, %t)  # mlp
return y=%y
"""
NORMED = LINEAR.replace("xf.linear(%t, %up", "xf.linear(%n, %up").replace(
    "%u:", "%n: f32[batch,length,16] = xf.layer_norm(%t) {eps=1e-05}\n%u:"
)


def batch(length: int = 40) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, length, WIDTH), "p": torch.randn(2, length, WIDTH)}


def places(program: Program, data: list[dict[str, torch.Tensor]]) -> dict[str, Defect | Opaque]:
    return {place.path: place for place in outlier_tokens(program, data)}


def test_of_linear_steps_the_direction_is_that_of_the_product() -> None:
    program = Program.parse(LINEAR)
    found = places(program, [batch()])
    weights = {name: value.double().numpy() for name, value in program.parameters.items()}
    # each of the two value heads is read by two heads
    values = np.repeat(weights["v"].reshape(2, 4, WIDTH), 2, axis=0).reshape(WIDTH, WIDTH)
    attention = np.eye(WIDTH) + weights["o"] @ values
    both = (np.eye(WIDTH) + weights["down"] @ weights["up"]) @ attention
    for path, product in (("attention", attention), ("mlp", both)):
        place = found[path]
        assert isinstance(place, Defect)
        left, spectrum, _ = np.linalg.svd(product)
        assert abs(float(place.direction.numpy() @ left[:, 0])) == pytest.approx(1, abs=1e-9)
        assert place.dominance == pytest.approx(spectrum[0] / spectrum[1], rel=1e-9)
    embeddings = found["embeddings"]
    assert isinstance(embeddings, Opaque)
    assert embeddings.reason == "it reads the input x"


def test_a_fused_norm_hands_the_sum_on() -> None:
    data = batch()
    program = Program.parse(NORMED)
    fused = parse_pass("fuse-add-norm").run(program, Context()).program
    assert "xf.add_layer_norm" in str(fused)
    apart, together = (outlier_tokens(form, [data]) for form in (program, fused))
    assert len(apart) == len(together) == 3
    for one, other in zip(apart[1:], together[1:], strict=True):
        assert isinstance(one, Defect)
        assert isinstance(other, Defect)
        assert other.norm_ratio == pytest.approx(one.norm_ratio, rel=1e-5)
        assert abs(float(one.direction @ other.direction)) > 0.999


def with_defect() -> tuple[Program, torch.Tensor, dict[str, torch.Tensor]]:
    """A network whose MLP turns what lies along one direction into very long tokens along another."""
    into, out = (torch.nn.functional.normalize(torch.randn(WIDTH), dim=0) for _ in range(2))
    into = torch.nn.functional.normalize(into - into.mean(), dim=0)
    parameters = {name: value * 0.3 for name, value in Program.parse(NORMED).parameters.items()}
    parameters["up"] = parameters["up"].clone()
    parameters["up"][0] = 6 * into
    parameters["down"] = parameters["down"].clone()
    parameters["down"][:, 0] = 6 * out
    data = batch()
    data["x"][1, 7], data["p"][1, 7] = -12 * into, torch.zeros(WIDTH)
    return Program.parse(NORMED, parameters=parameters), out, data


def test_a_planted_defect_is_reported() -> None:
    program, out, data = with_defect()
    place = places(program, [data])["mlp"]
    assert isinstance(place, Defect)
    assert abs(float(place.direction @ out.double())) > 0.95
    assert place.alignment > 0.8
    tokens = torch.linalg.vector_norm(program.run(data)["y"], dim=-1)
    assert place.norm_ratio == pytest.approx(float(tokens.max() / tokens.double().median()), rel=1e-6)
    result = parse_pass("detect-outlier-tokens{ratio=2.5}").run(program, Context(calibration=[data]))
    assert not result.changed
    assert result.program is program
    assert any(note.startswith("warning: at mlp") and "the weights amplify" in note for note in result.notes)


def test_long_tokens_that_no_weight_explains_are_told_apart() -> None:
    program = Program.parse(LINEAR)
    data = batch()
    place = places(program, [data])["attention"]
    assert isinstance(place, Defect)
    # a long token across the direction, where attention spreads it over all others
    small = {name: value * (0.01 if name in ("v", "up") else 1.0) for name, value in program.parameters.items()}
    data["x"][0, 0] *= 60
    quiet = Program.parse(LINEAR, parameters=small)
    result = parse_pass("detect-outlier-tokens{alignment=1.0}").run(quiet, Context(calibration=[data]))
    assert all("do not foretell" in note for note in result.notes)


def test_an_ordinary_network_gives_no_warning() -> None:
    program = Program.parse(NORMED)
    result = parse_pass("detect-outlier-tokens").run(program, Context(calibration=[batch()]))
    assert len(result.notes) == 1
    assert "no token of outlying norm at 2 sums" in result.notes[0]
    assert [refused.reason for refused in result.rejected] == ["it reads the input x"]


def test_padding_does_not_count() -> None:
    text = LINEAR.replace("param %q:", "input %mask: i64[batch,length]\nparam %q:", 1)
    text = text.replace("y=%y", "y=%y valid keep %mask").replace("%lv, %lv)", "%lv, %lv, %keep)")
    text = text.replace("%h:", "%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}\n%h:", 1)
    data = batch()
    data["mask"] = torch.ones(2, 40, dtype=torch.long)
    data["mask"][1, 30:] = 0
    data["x"][1, 30:] = 1e4
    for place in outlier_tokens(Program.parse(text), [data]):
        assert isinstance(place, Opaque) or place.norm_ratio < 4


@pytest.mark.parametrize("name", ["vit-tiny", pytest.param("llama-tiny", marks=pytest.mark.slow)])
def test_models_of_the_zoo_have_maps(name: str) -> None:
    lifted = Pipeline([]).run(capture(name)).program
    found = outlier_tokens(lifted, [lifted.example_inputs])
    assert sum(isinstance(place, Defect) for place in found) >= 4


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="--calibration"):
        outlier_tokens(Program.parse(LINEAR), [])
    nothing = parse_pass("detect-outlier-tokens").run(
        Program.parse('program "m" lifted\ninput %x: f32[2,3,4]\n%y: f32[2,3,4] = aten.neg(%x)\nreturn y=%y\n'),
        Context(calibration=[{"x": torch.randn(2, 3, 4)}]),
    )
    assert "nothing to look at: 0 sums" in nothing.notes[0]
    for text, message in (("ratio=1", "larger than 1"), ("alignment=0", "must lie in")):
        with pytest.raises(UsageError, match=message):
            parse_pass(f"detect-outlier-tokens{{{text}}}")
