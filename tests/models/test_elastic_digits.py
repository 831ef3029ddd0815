"""Models of several sizes: what a training step uses is exactly what the pass takes out of the trained model later."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from xformopt.analysis.coupling import find_groups
from xformopt.capture.exporter import capture_module
from xformopt.models.hvt import Hvt
from xformopt.models.zoo import find_trained
from xformopt.passes import build_pass
from xformopt.passes.prune.support.removal import remove_units
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program

pytest.importorskip("sklearn")
IMAGES = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def lifted(module: torch.nn.Module) -> Program:
    return Pipeline().run(capture_module(module, {"pixel_values": IMAGES})).program


def test_a_nested_step_is_the_extracted_model() -> None:
    from xformopt.models.tasks.digits_elastic_models import SHARES, prefix_of

    module = find_trained("digits-matformer").fresh().eval().requires_grad_(False)
    program = lifted(module)
    groups = [group for group in find_groups(program, "hidden") if group.pinned is None and group.consumers]
    assert len(groups) == 6
    for share in SHARES:
        kept = {group: torch.arange(group.units) < round(group.units * share) for group in groups}
        found = remove_units(program, kept).run({"pixel_values": IMAGES})["logits"]
        want = functional_call(module, prefix_of(module, share), (IMAGES,))["logits"]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_a_flexible_step_is_the_resized_model() -> None:
    from xformopt.models.tasks.digits_elastic_models import PATCHES, with_patches

    module = find_trained("digits-flexivit").fresh().eval().requires_grad_(False)
    program, whole = lifted(module), module(IMAGES)["logits"]
    for patch in PATCHES:
        with with_patches(module, patch) as weights:
            want = functional_call(module, weights, (IMAGES,))["logits"]
        resized = build_pass("resize-patches", {"patch": patch}).run(program, Context())
        assert resized.changed == (patch != 4)
        found = resized.program.run({"pixel_values": IMAGES})["logits"]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(IMAGES)["logits"], whole)


def test_tokens_are_pooled_between_stages() -> None:
    module, seen = find_trained("digits-hvt").fresh().eval(), []
    assert isinstance(module, Hvt)
    module.norm.register_forward_pre_hook(lambda norm, arguments: seen.append(arguments[0].shape[1]))
    module(IMAGES)
    assert seen == [7]


@pytest.mark.parametrize("name", ["digits-matformer", "digits-flexivit", "digits-hvt"])
def test_training_draws_several_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xformopt.models.tasks import digits_elastic_models as elastic
    from xformopt.models.tasks.digits import Digits

    images, labels = Digits(2).training()
    monkeypatch.setattr(Digits, "training", lambda task: (images[:64], labels[:64]))
    monkeypatch.setattr(elastic, "_LESSONS", elastic.Lessons(6, partly=0))
    drawn: list[object] = []
    for function in ("prefix_of", "with_patches"):
        real = getattr(elastic, function)
        monkeypatch.setattr(elastic, function, lambda module, size, real=real: drawn.append(size) or real(module, size))
    model = find_trained(name)
    module = model.fresh()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model.train(module, 2, lambda what, done, total: None)
    assert all(not torch.equal(before[key], value) for key, value in module.state_dict().items() if value.dim() > 1)
    wanted = {"digits-matformer": elastic.SHARES, "digits-flexivit": elastic.PATCHES, "digits-hvt": ()}[name]
    assert set(drawn) <= set(wanted)
    assert len(set(drawn)) >= min(len(wanted), 2)
