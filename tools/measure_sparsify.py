"""What computing a part of attention costs and saves: on trained tasks, and the time alone of long inputs.

    python tools/measure_sparsify.py [MODEL ...] [--rounds N]      writes tools/results/sparsify.json

Every technique computes 25, 12 and 6 % of the attention, at the longest input; none trains.  For each: the task's
metric on ort-cpu before and after, the FLOPs that are left, and the time beside that of the exact artifact (one run,
rounds interleaved, two threads, batch 1) at the task's longest input.  ``listops-t5 long`` and ``gpt long`` are timed
alone, at 1,024 and 2,048 tokens: the first with trained weights, the second with random ones.  Techniques work on the
lifted program; the exact recipe follows them, as it makes the artifact that they are compared with.  A technique that
refuses says why.  ``dit`` is a denoiser with random weights, run by torch: how far the latent is from that of exact
steps after a number of them, by the mask alone, with residuals carried, and with all of Re-ttention's statistics; it
tells what carrying is worth, and nothing of images.  A model that is in the file already is passed over, unless it is
named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))
from results_file import FOLDER, ResultsFile, beside, timed

import xformopt as xo
from xformopt.analysis import cost
from xformopt.benchmark import Candidate
from xformopt.errors import XformoptError
from xformopt.evaluation import artifact_subject, calibration_of, judge
from xformopt.lowering.artifact import Artifact
from xformopt.models.dit import Dit, DitConfig
from xformopt.models.gpt import Gpt, GptConfig
from xformopt.models.tasks.task import Score, Task
from xformopt.models.zoo import find_trained
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.pipeline.recipes import load_recipe
from xformopt.program import Program, example_sizes, sample_inputs
from xformopt.tasks import task_for

RESULTS = ResultsFile(FOLDER / "sparsify.json", "xformopt/sparsify/1")
SHARES = (0.25, 0.12, 0.06)
TECHNIQUES = {
    "dam": "mask-attention{{keep={keep},block={block},score=amplified}}",
    "dam, by mass": "mask-attention{{keep={keep},block={block},score=mass}}",
    "dam, by answer": "mask-attention{{keep={keep},block={block},score=answer}}",
    "mra-2": "refine-attention{{keep={keep},block={block}}}",
    "mra-2-s": "refine-attention{{keep={keep},block={block},coarse=false}}",
    "masformer, untrained": "localize-attention{{keep={keep}}}",
    "probsparse, untrained": "rank-queries{{keep={keep}}}",
    "combiner, untrained": "combine-regions{{block={block}}}",
    "routing, untrained": "route-attention{{clusters={clusters}}}",
}
BLOCKS = (64, 32, 16, 8, 4, 2)
FEW = 128
# of what a share allows, blocks on the diagonal may take this much
DIAGONAL = 0.75
LONG = (1024, 2048)
SAMPLES = 2


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        module: What it is.
        length: The longest input in tokens; 0 where it is fixed.
        tokens: How many tokens attention meets then.
        causal: Whether queries see no later keys.
        timed: The lengths it is timed at.
        task: What it is judged on, if anything.

    """

    module: nn.Module
    length: int
    tokens: int
    causal: bool
    timed: tuple[int, ...]
    task: Task | None = None


def trained(name: str, length: int, tokens: int, *, causal: bool = False) -> Subject:
    """Return a trained model with its task, on the first fold."""
    model = find_trained(name).on_fold(0)
    return Subject(
        model.build(), length, tokens, causal, (length,) if length else (), task_for(model.task, model.label)
    )


def long_listops() -> Subject:
    """Return a trained encoder for inputs longer than those of its task."""
    return Subject(find_trained("listops-t5").build(), max(LONG), max(LONG), False, LONG)


def long_gpt() -> Subject:
    """Return a causal model with random weights."""
    torch.manual_seed(0)
    config = GptConfig(vocabulary=256, length=max(LONG), width=192, depth=4, heads=3)
    return Subject(Gpt(config).eval().requires_grad_(False), max(LONG), max(LONG), True, LONG)


MODELS = {
    "digits-vit": lambda: trained("digits-vit", 0, 65),
    "listops-t5": lambda: trained("listops-t5", 512, 512),
    "pycode-gpt": lambda: trained("pycode-gpt", 512, 512, causal=True),
    "recall-llama": lambda: trained("recall-llama", 2048, 2048, causal=True),
    "listops-t5 long": long_listops,
    "gpt long": long_gpt,
}


DENOISER = "dit"
STEPS, FULL_AT_FIRST, FULL_EVERY = 20, 5, 5
# what carry-statistics is told, beside the share; None: statistics are thrown away
CARRIED = {"re-ttention": "", "residual only": ",reshape=false", "mask alone": None}


def measure_denoiser() -> dict[str, Any]:
    """Measure Re-ttention and its controls on a denoiser whose weights are random."""
    torch.manual_seed(0)
    module = Dit(DitConfig()).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    example = module.example_inputs()
    program = Pipeline([]).run(xo.capture(module, example, {name: {0: "batch"} for name in example})).program
    seen: list[dict[str, torch.Tensor]] = []

    def exactly(number: int, given: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(given)
        return program.run(given)["noise"]

    start = example["latent"]
    exact = denoise(start, exactly)
    sizes, rows = {**example_sizes(program), "batch": 1}, {}
    for label, options in CARRIED.items():
        for keep in SHARES:
            text = f"carry-statistics{{step=%s,keep={keep},block={BLOCKS[-1]}{options or ''}}}"
            # as many data as steps, so that masks are those of all steps
            full, sparse = (
                Pipeline([parse_pass(text % step)]).run(program, calibration=seen).program
                for step in ("full", "sparse")
            )
            found = denoise(start, partial(carrying, full, sparse, {}, options is not None))
            rows[f"{label} {keep:.0%}"] = {
                "pass": text % "sparse",
                "distance": float((found - exact).norm() / (exact - start).norm()),
                "flops_left": cost(sparse, sizes).flops / cost(program, sizes).flops,
            }
            print(DENOISER, label, keep, rows[f"{label} {keep:.0%}"], flush=True)
    return {"techniques": rows, "steps": STEPS, "full_at_first": FULL_AT_FIRST, "full_every": FULL_EVERY}


def denoise(latent: torch.Tensor, run: Callable[[int, dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
    """Take a fixed share of the noise away at each step; ``run(number, inputs)`` tells the noise."""
    channels = latent.shape[1]
    for number in range(STEPS):
        step = torch.full((len(latent),), 1000.0 * (1 - number / STEPS))
        given = {"latent": latent, "timestep": step, "label": torch.tensor([1, 7])}
        latent = latent - run(number, given)[:, :channels] / STEPS
    return latent


def carrying(
    full: Program,
    sparse: Program,
    state: dict[str, torch.Tensor],
    keeps: bool,
    number: int,
    given: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Run one step by the program that is due, and keep what it leaves in ``state``, or forget it."""
    due = full if number < FULL_AT_FIRST or number % FULL_EVERY == 0 else sparse
    outputs = due.run({**given, **state} if due is sparse else given)
    if keeps:
        state |= {f"past_{name[8:]}": value for name, value in outputs.items() if name.startswith("present_")}
    return outputs["noise"]


def capture(subject: Subject) -> Program:
    """Capture a model for inputs up to its longest one."""
    inputs = subject.module.example_inputs()  # type: ignore[operator]
    if not subject.length:
        return xo.capture(subject.module, inputs)
    axes = {name: {0: "batch", 1: ("length", 1, subject.length)} for name in inputs}
    return xo.capture(subject.module, inputs, axes)


def block_of(subject: Subject, keep: float) -> int:
    """Return the largest block of which the diagonal leaves room for others; few tokens are cut into small blocks."""
    for block in BLOCKS if subject.tokens > FEW else BLOCKS[-1:]:
        count = -(-subject.tokens // block)
        if (2 / (count + 1) if subject.causal else 1 / count) <= DIAGONAL * keep:
            return block
    return BLOCKS[-1]


def sizes_at(program: Program, length: int) -> dict[str, int]:
    """Return batch 1 at a length."""
    return {**example_sizes(program), "batch": 1, **({"length": length} if length else {})}


def build(program: Program, folder: Path) -> Artifact:
    """Lower a program, with the default forms: those of both sides are then the same."""
    artifact = xo.lower(program, measure=False)
    artifact.save(folder, program=False)
    return artifact


def scored(subject: Subject, artifact: Artifact) -> Score | None:
    """Judge an artifact on the task, if there is one."""
    return None if subject.task is None else judge(subject.task, artifact_subject(artifact), None).score


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure every technique at every share on one model."""
    subject = MODELS[name]()
    program = capture(subject)
    longest = sizes_at(program, subject.length)
    if subject.task is not None:
        samples = calibration_of(subject.task, program)
    else:
        samples = [sample_inputs(program, longest, seed=seed) for seed in range(SAMPLES)]
    exact = Pipeline(load_recipe("exact")).run(program, calibration=samples).program
    flops = cost(exact, longest).flops
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        artifact = build(exact, Path(scratch) / "exact")
        reached = scored(subject, artifact)
        candidates = [Candidate("exact", "ort-cpu", Path(scratch) / "exact", flops=flops)]
        for label, text in passes_for(subject):
            try:
                technique = parse_pass(text)
                result = Pipeline([technique, *load_recipe("exact")]).run(program, calibration=samples)
                record = next(record for record in result.history if record.name == technique.name)
                if not record.changed:
                    raise XformoptError("; ".join(reason for reason, _ in record.rejected))
                folder = Path(scratch) / f"{len(rows)}"
                row = beside(reached, scored(subject, build(result.program, folder)))
            except XformoptError as error:
                rows[label] = {"pass": text, "refused": str(error)}
            else:
                left = cost(result.program, longest).flops
                rows[label] = {"pass": text, "flops_left": left / flops, "notes": list(record.notes), **row}
                candidates.append(Candidate(label, "ort-cpu", folder, flops=left, max_relative_l2=float("inf")))
            print(name, label, {key: value for key, value in rows[label].items() if key != "pass"}, flush=True)
        for length in subject.timed or (0,):
            inputs = sample_inputs(program, sizes_at(program, length), seed=1)
            for label, run in timed(candidates, exact, inputs, name, rounds=rounds).items():
                row = {"p50_ms": run.latency_ms.p50 if run.latency_ms else None, "error": run.error}
                row |= {} if run.speedup is None else {"speedup": run.speedup.model_dump()}
                rows.setdefault(label, {}).setdefault("timed", {})[str(length or subject.tokens)] = row
                print(name, length, label, row, flush=True)
    found: dict[str, Any] = {"techniques": rows, "flops": flops, "tokens": subject.tokens}
    if subject.task is not None and reached is not None:
        found |= {"task": subject.task.name, "metric": subject.task.metric, "exact": reached.value}
        found |= {"higher_is_better": subject.task.higher_is_better, "count": reached.count}
    return found


def passes_for(subject: Subject) -> Iterator[tuple[str, str]]:
    """Yield each technique at each share, with the pass it is."""
    for label, text in TECHNIQUES.items():
        for keep in SHARES:
            yield f"{label} {keep:.0%}", text.format(keep=keep, block=block_of(subject, keep), clusters=round(1 / keep))


def main() -> None:
    """Measure the models named on the command line, or all that have not been measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL", help=f"of {', '.join([*MODELS, DENOISER])}")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    known = [*MODELS, DENOISER]
    if unknown := [name for name in options.models if name not in known]:
        sys.exit(f"There is no model {unknown[0]!r} here: name {', '.join(known)}.")
    for name in options.models or [name for name in known if name not in RESULTS.entries()]:
        RESULTS.put(name, measure_denoiser() if name == DENOISER else measure(name, options.rounds))


if __name__ == "__main__":
    main()
