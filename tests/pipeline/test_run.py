"""The pipeline's promise: what a pass breaks is named and taken back, what it costs is recorded and budgeted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import fx

from xformopt.errors import DataError, PassError, ProgramError, UsageError, VerificationError
from xformopt.match import is_call
from xformopt.pipeline import Context, Effect, Pass, PassResult, Pipeline, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Editor, Rule

aten = torch.ops.aten
TEXT = """program "m" lifted
dim batch in [1, inf]
input %x: f32[batch,4]
%a: f32[batch,4] = aten.add.Tensor(%x, %x)  # first
%b: f32[batch,4] = aten.sigmoid(%a)  # second
%c: f32[batch,4] = aten.add.Tensor(%b, %b)  # third
return y=%c
"""


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    return tmp_path


@dataclass(frozen=True)
class Scale(RewritePass):
    """``x + x`` is ``factor x``: right for 2, and wrong under the module ``wrong_at`` otherwise."""

    factor: float = 2.0
    wrong_at: str = "first"

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        def double(editor: Editor, node: fx.Node) -> fx.Node | None:
            if not is_call(node, aten.add.Tensor) or node.args[0] is not node.args[1]:
                return None
            factor = self.factor if node.meta["path"] == self.wrong_at else 2.0
            return editor.call(aten.mul.Scalar, node.args[0], factor)

        return (double,)


@dataclass(frozen=True)
class ScaleRoughly(Scale):
    """The same, and says that it is not exact."""

    effect: ClassVar[Effect] = "approximate"


@dataclass(frozen=True)
class Assuming(Pass):
    """Does nothing, and asks for a fact."""

    assumptions: ClassVar[tuple[str, ...]] = ("sun-shines",)

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program, False, notes=tuple(context.assume))


def run_as(function: Callable[[Program], PassResult]) -> Pass:
    @dataclass(frozen=True)
    class Custom(Pass):
        def run(self, program: Program, context: Context) -> PassResult:
            return function(program)

    return Custom()


def test_an_exact_pass_is_checked_and_recorded(program: Program) -> None:
    seen: list[str] = []
    result = Pipeline([Scale()]).run(program, observe=lambda record, _: seen.append(record.name))
    (record,) = result.history
    assert seen == ["scale"] == [record.name]
    assert record.changed
    assert record.fired == 2
    assert record.relative_l2 < 1e-6
    assert record.dropped is None
    x = {"x": torch.randn(3, 4)}
    torch.testing.assert_close(result.program.run(x)["y"], program.run(x)["y"])


@pytest.mark.parametrize("place", ["first", "third"])
def test_the_one_wrong_rewrite_is_named_and_both_sides_kept(program: Program, cache: Path, place: str) -> None:
    before = str(program)
    with pytest.raises(VerificationError, match=f"scale changed what {place} computes: its rewrite double") as caught:
        Pipeline([Scale(factor=2.001, wrong_at=place)]).run(program)
    assert str(program) == before
    (folder,) = (cache / "failures").iterdir()
    assert str(folder) in str(caught.value)
    assert {path.name for path in folder.iterdir()} == {"before.txt", "after.txt", "values.safetensors"}
    assert "aten.add" in (folder / "before.txt").read_text()
    assert "2.001" in (folder / "after.txt").read_text()


def test_an_exact_pass_that_names_no_rewrites_is_judged_end_to_end(program: Program) -> None:
    def replace_everything(_: Program) -> PassResult:
        return PassResult(
            Program.parse(TEXT.replace("%c: f32[batch,4] = aten.add", "%c: f32[batch,4] = aten.mul")), True
        )

    with pytest.raises(VerificationError, match="custom changed the outputs"):
        Pipeline([run_as(replace_everything)]).run(program)


def test_a_pass_that_raises_is_named_with_those_before_it(program: Program) -> None:
    def fail(_: Program) -> PassResult:
        raise KeyError("lost")

    with pytest.raises(PassError, match=r"custom failed with KeyError: 'lost' \(passes before it: scale\)"):
        Pipeline([Scale(), run_as(fail)]).run(program)


def test_an_invalid_program_is_the_fault_of_its_pass(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Program) -> None:
        raise ProgramError("a node reads what comes later")

    monkeypatch.setattr("xformopt.pipeline.run.check", refuse)
    with pytest.raises(PassError, match="scale left the program invalid: a node reads what comes later"):
        Pipeline([Scale()]).run(program)


def test_drift_is_measured_independently(program: Program) -> None:
    (record,) = Pipeline([ScaleRoughly(factor=2.1, wrong_at="third")]).run(program).history
    # the last product is 5 % too large, whatever the input
    assert record.drift == pytest.approx(0.05, rel=1e-3)
    assert record.relative_l2 == pytest.approx(0.05, rel=1e-3)


def test_a_pass_over_its_budget_is_taken_back_and_the_run_goes_on(program: Program) -> None:
    rough = ScaleRoughly(factor=2.1, wrong_at="third")
    result = Pipeline([rough, Scale()], max_drift=0.01).run(program)
    dropped, kept = result.history
    assert dropped.dropped is not None
    assert "over the budget of 1.00e-02" in dropped.dropped
    assert kept.dropped is None
    assert kept.drift < 1e-6


def test_strict_stops_at_the_budget(program: Program) -> None:
    rough = ScaleRoughly(factor=2.1, wrong_at="third")
    with pytest.raises(VerificationError, match="scale-roughly was taken back and the run stopped"):
        Pipeline([rough], max_drift=0.01, strict=True).run(program)


@dataclass(frozen=True)
class Mend(RewritePass):
    """Brings a product that is too large back to ``factor``."""

    factor: float = 2.0
    effect: ClassVar[Effect] = "tuned"
    recovers: ClassVar[bool] = True

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        def mend(editor: Editor, node: fx.Node) -> fx.Node | None:
            if not is_call(node, aten.mul.Scalar) or node.args[1] <= self.factor:
                return None
            return editor.call(aten.mul.Scalar, node.args[0], self.factor)

        return (mend,)


@pytest.mark.parametrize(("factor", "is_kept"), [(2.0, True), (2.05, False), (3.0, False)])
def test_the_budget_is_judged_behind_recovery(program: Program, factor: float, is_kept: bool) -> None:
    rough = ScaleRoughly(factor=2.1, wrong_at="third")
    steps = (rough, Scale(factor=2.1), Mend(factor=factor))
    result = Pipeline(steps, max_drift=0.01).run(program)
    lossy, _, mended = result.history
    assert "judged again behind recovery" in lossy.notes[-1]
    assert (lossy.dropped is None) is is_kept
    if is_kept:
        assert mended.dropped is None
        assert mended.drift < 1e-6
    else:
        assert "behind recovery, " in str(lossy.dropped)
        assert str(result.program) == str(program)
        with pytest.raises(VerificationError, match="run stopped"):
            Pipeline(steps, max_drift=0.01, strict=True).run(program)


@pytest.mark.parametrize(("interval", "keep_if_faster", "is_kept"), [
    ((1.2, 1.4), True, True),
    ((0.9, 1.1), True, False),
    ((0.9, 1.1), False, True),
])  # fmt: skip
def test_a_lossy_pass_must_buy_time(
    program: Program, interval: tuple[float, float], keep_if_faster: bool, is_kept: bool
) -> None:
    pipeline = Pipeline([ScaleRoughly()], keep_if_faster=keep_if_faster)
    result = pipeline.run(program, measure=lambda before, after: interval)
    (record,) = result.history
    assert record.speedup == interval
    assert (record.dropped is None) is is_kept
    assert (result.program.fingerprint == program.fingerprint) is not is_kept
    if interval[0] <= 1:
        assert "buys no measured time" in (record.dropped or "".join(record.notes))


def test_exact_passes_are_not_timed(program: Program) -> None:
    def never(before: Program, after: Program) -> tuple[float, float]:
        raise AssertionError("an exact pass was timed")

    Pipeline([Scale()]).run(program, measure=never)


def test_a_fact_reaches_the_passes_that_ask_for_it(program: Program) -> None:
    (record,) = Pipeline([Assuming()]).run(program, assume=["sun-shines"]).history
    assert record.notes == ("sun-shines",)


def test_a_fact_that_no_pass_asks_for_is_refused(program: Program) -> None:
    with pytest.raises(UsageError, match=r"No pass asks whether 'sun-shone' holds.*ask for: sun-shines"):
        Pipeline([Assuming()]).run(program, assume=["sun-shone"])


def test_calibration_of_a_wrong_shape_stops_before_the_first_pass(program: Program) -> None:
    with pytest.raises(DataError, match=r"x must be f32\[batch, 4\]"):
        Pipeline([Scale()]).run(program, calibration=[{"x": torch.randn(2, 5)}])


def test_a_captured_program_is_lifted_first() -> None:
    captured = Program.parse(TEXT.replace("lifted", "captured"))
    result = Pipeline([Scale()]).run(captured)
    assert [record.name for record in result.history] == ["lift", "scale"]
    assert result.captured is captured
