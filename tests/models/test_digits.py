"""The digits: folds that share nothing, inputs as promised, and models that reach what they are said to."""

from __future__ import annotations

import pytest
import torch

from xformopt.models.tasks.classification import divergence
from xformopt.models.tasks.digits import Digits
from xformopt.models.zoo import find_trained, trained

pytest.importorskip("sklearn")


def rows_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_folds_divide_the_data() -> None:
    parts = [torch.cat([batch.inputs["pixel_values"] for batch in Digits(fold).test()]) for fold in range(5)]
    assert [len(part) for part in parts] == [360, 360, 359, 359, 359]
    assert len(set().union(*map(rows_of, parts))) == 1797
    labels = torch.cat([batch.targets["label"] for batch in Digits(3).test()])
    assert labels.bincount().min() >= 34


def test_nothing_tested_is_seen_before() -> None:
    task = Digits(1)
    tested = rows_of(torch.cat([batch.inputs["pixel_values"] for batch in task.test()]))
    assert not tested & rows_of(task.training()[0])
    calibration = torch.cat([batch["pixel_values"] for batch in task.calibration()])
    assert len(calibration) == 240
    assert not tested & rows_of(calibration)


def test_the_images_are_normalized() -> None:
    images, labels = Digits().training()
    assert images.shape[1:] == (1, 32, 32)
    assert abs(float(images.mean())) < 0.02
    assert 0.8 < float(images.std()) < 1.2
    assert labels.dtype == torch.int64


def test_a_fold_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="fold must be 0 to 4, but is 5"):
        Digits(5)


def test_baselines_are_far_below_a_model() -> None:
    found = Digits().baselines()
    assert 0.09 < found["commonest class"] < 0.12
    assert 0.85 < found["nearest class mean"] < 0.93


def test_divergence_is_that_of_the_definition() -> None:
    wanted, logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.randn(5, 3)
    p, q = wanted.double().softmax(1), logits.double().softmax(1)
    expected = [sum(float(p[i, c]) * float((p[i, c] / q[i, c]).log()) for c in range(3)) for i in range(5)]
    assert divergence(wanted, logits).tolist() == pytest.approx(expected)
    assert divergence(wanted, wanted).tolist() == [0.0] * 5


def test_distortions_are_small_and_drawn_from_the_generator() -> None:
    from xformopt.models.tasks.digits_models import distort

    images, _ = Digits().training()
    drawn = [distort(images[:8], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # what comes in from outside is background, as dark as the darkest pixel
    assert float(drawn[0].min()) >= float(images.min()) - 1e-5
    assert 0.5 < float((drawn[0] * images[:8]).mean() / (images[:8] ** 2).mean()) < 1


@pytest.mark.parametrize("name", [name for name in trained() if name.startswith("digits-")])
def test_out_of_fold_accuracy(name: str) -> None:
    model, right, count = find_trained(name), 0.0, 0
    for fold in range(model.folds):
        module = model.on_fold(fold).build()
        score = Digits(fold).evaluate(lambda inputs, module=module: module(**inputs))
        right, count = right + score.value * score.count, count + score.count
    assert count == (1797 if model.folds > 1 else 360)
    assert right / count >= 0.97


def test_a_student_and_its_teacher_see_the_training_folds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from xformopt.models.tasks import digits_models

    images, labels = Digits(2).training()
    asked: list[int] = []

    def training(task: Digits) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(task.fold)
        return images[:96], labels[:96]

    monkeypatch.setattr(Digits, "training", training)
    monkeypatch.setattr(digits_models, "_DEIT", digits_models.Lessons(1))
    monkeypatch.setattr(digits_models, "_TEACHER", digits_models.Lessons(2))
    module, steps = find_trained("digits-deit").fresh(), []
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = find_trained("digits-deit")
    model.train(module, 2, lambda what, done, total: steps.append((what.startswith("the teacher"), done, total)))
    assert asked == [2, 2]
    assert steps == [*((True, step, 6) for step in range(1, 7)), *((False, step, 3) for step in range(1, 4))]
    for name in ("head.weight", "distillation_head.weight", "prefix"):
        assert not torch.equal(before[name], module.state_dict()[name])


def test_branches_are_joined_while_a_model_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from xformopt.models import joined
    from xformopt.models.tasks import digits_models

    images, labels = Digits(1).training()
    monkeypatch.setattr(Digits, "training", lambda task: (images[:256], labels[:256]))
    monkeypatch.setattr(digits_models, "_JOINED", digits_models.Lessons(1))
    model, shares = find_trained("digits-joined3"), []
    module = model.fresh()
    attention = module.backbone.blocks[0].attention
    assert isinstance(attention, joined.JoinedAttention)
    assert len(attention.query) == 4
    attention.register_forward_pre_hook(lambda block, given: shares.append(block.joined))
    model.train(module, 1, lambda what, done, total: None)
    # eight steps: apart, then more and more of one, and one at the end
    assert shares == pytest.approx([0, 0.05, 0.3, 0.55, 0.8, 1, 1, 1])


def test_the_two_answers_of_a_deit_are_averaged() -> None:
    module = find_trained("digits-deit").fresh().eval()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = module.answers(images)
        assert not torch.allclose(first, second)
        torch.testing.assert_close(module(images)["logits"], (first + second) / 2)
        assert len(find_trained("digits-vit").fresh().answers(images)) == 1


def test_half_of_the_patches_are_seen_in_training_only() -> None:
    from xformopt.models.tasks.digits_models import some_patches

    model, seen = find_trained("digits-vit").fresh(), []
    model.backbone.norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    images = torch.zeros(2, 1, 32, 32)
    for wanted in (True, False):
        with some_patches(model, torch.Generator(), wanted), torch.no_grad():
            model(images)
    with torch.no_grad():
        model(images)
    assert seen == [33, 65, 65]
