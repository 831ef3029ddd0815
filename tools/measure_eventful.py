"""What token gates save on video, and what they cost in answers: digits-vit on digits that drift before a background.

    python tools/measure_eventful.py            writes tools/results/eventful.json
    python tools/measure_eventful.py --time     also times each r against the whole model (wants a quiet machine)

The video is made here: an image of the held-out fold moves a pixel in every other frame over a background that stays,
with noise in every pixel of every frame.  A stream is 16 frames; the first recomputes all tokens, the others r.  For
each r: accuracy over the frames behind the first, how often the answer is that of the model without gates on the same
frame, the relative L2 of the logits, and the share of the operations that is left, by operator.  Times are ratios of
medians, rounds of both interleaved in one process, batch 1, two threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xformopt as xo
from xformopt.analysis import cost
from xformopt.lowering.artifact import Artifact
from xformopt.measure.machine import describe_machine
from xformopt.models.tasks.digits import DEVIATION, MEAN, Digits
from xformopt.original import capture_original
from xformopt.passes import build_pass
from xformopt.pipeline import Pipeline
from xformopt.program import Program

RESULTS = Path(__file__).parent / "results" / "eventful.json"
MODEL = "digits-vit"
STREAMS, FRAMES = 60, 16
NOISES = (0.0, 0.02)
RECOMPUTED = (4, 8, 16, 24, 32, 48, 65)
ROUNDS, RUNS = 15, 10


def video(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames ``[FRAMES, STREAMS, 1, 32, 32]`` and the labels of the streams."""
    batches = list(Digits(0).test())
    images = torch.cat([batch.inputs["pixel_values"] for batch in batches])[:STREAMS]
    labels = torch.cat([batch.targets["label"] for batch in batches])[:STREAMS]
    generator = torch.Generator().manual_seed(0)
    backgrounds = torch.rand(images.shape, generator=generator) * 0.2
    directions = torch.randint(-1, 2, (STREAMS, 2), generator=generator).tolist()
    frames = []
    for number in range(FRAMES):
        # back and forth, at most two pixels from the middle
        shift = (0, 1, 2, 1, 0, -1, -2, -1)[number // 2 % 8]
        moved = [
            torch.roll(image, (shift * y, shift * x), (1, 2)) for image, (y, x) in zip(images, directions, strict=True)
        ]
        drawn = torch.maximum(torch.stack(moved) * DEVIATION + MEAN, backgrounds)
        drawn = drawn + noise * torch.randn(drawn.shape, generator=generator)
        frames.append((drawn - MEAN) / DEVIATION)
    return torch.stack(frames), labels


def watched(artifact: Artifact, frames: torch.Tensor, r: int) -> np.ndarray:
    """Return the logits of every frame behind the first ``[FRAMES - 1, STREAMS, 10]``, with r tokens recomputed."""
    state: dict[str, np.ndarray] = {}
    answers = []
    for number, frame in enumerate(frames):
        ranks = {"ranks": np.arange(r)} if number else {}
        found = artifact.run(pixel_values=frame.numpy(), **ranks, **state)
        answers.append(found["logits"])
        state = {f"past_{name[8:]}": value for name, value in found.items() if name.startswith("present_")}
    return np.stack(answers[1:])


def work(program: Program, sizes: dict[str, int]) -> Counter[str]:
    """Count the operations of one frame by operator."""
    counted: Counter[str] = Counter()
    for node in cost(program, {"batch": 1, **sizes}).by_node:
        counted[node.operator] += node.flops
    return counted


def answers_at(noise: float, whole: Artifact, gated: Artifact) -> dict[str, Any]:
    """Judge every r on one video."""
    frames, labels = video(noise)
    want = np.stack([whole.run(pixel_values=frame.numpy())["logits"] for frame in frames[1:]])
    right = labels.numpy()[None]
    rows = {}
    for r in RECOMPUTED:
        found = watched(gated, frames, r)
        rows[str(r)] = {
            "accuracy": float((found.argmax(-1) == right).mean()),
            "agreement": float((found.argmax(-1) == want.argmax(-1)).mean()),
            "relative_l2": float(np.linalg.norm(found - want) / np.linalg.norm(want)),
        }
        print(f"noise {noise}, r {r}: {rows[str(r)]}", flush=True)
    return {"whole_accuracy": float((want.argmax(-1) == right).mean()), "recomputed": rows}


def work_left(whole: Program, gated: Program) -> dict[str, Any]:
    """Return the share of the whole model's operations that each r leaves, in all and by operator."""
    before = work(whole, {})
    rows = {}
    for r in RECOMPUTED:
        after = work(gated, {"recomputed": r})
        by_operator = {name: after[name] / before[name] for name in sorted(before) if before[name]}
        gates = after["xf.changed_tokens"] / before.total()
        rows[str(r)] = {"all": after.total() / before.total(), "by_operator": by_operator, "gates": gates}
    return rows


def times(whole: Artifact, gated: Artifact) -> dict[str, float]:
    """Return the time of a frame at each r over that of the whole model: ratios of medians, rounds interleaved."""
    frames, _ = video(NOISES[-1])
    frame = frames[0, :1].numpy()
    first = gated.run(pixel_values=frame)
    state = {f"past_{name[8:]}": value for name, value in first.items() if name.startswith("present_")}
    calls: dict[str, dict[str, np.ndarray]] = {str(r): {"ranks": np.arange(r), **state} for r in RECOMPUTED}
    found: dict[str, list[float]] = {name: [] for name in ("whole", *calls)}
    for _ in range(ROUNDS):
        for name in found:
            artifact, extra = whole if name == "whole" else gated, calls.get(name, {})
            started = time.perf_counter()
            for _ in range(RUNS):
                artifact.session.run({"pixel_values": frame, **extra})
            found[name].append(time.perf_counter() - started)
    whole_time = statistics.median(found.pop("whole"))
    return {name: statistics.median(samples) / whole_time for name, samples in found.items()}


def lowered(program: Program, folder: Path) -> Artifact:
    """Lower with the default forms: those of both sides are then the same."""
    xo.lower(program, measure=False).save(folder, program=False)
    return xo.load(folder, threads=2)


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="also time it, which wants a quiet machine")
    options = parser.parse_args()
    captured = capture_original(MODEL).program
    exact = Pipeline.recipe("exact").run(captured).program
    gated = Pipeline([build_pass("gate-tokens", {}), *Pipeline.recipe("exact").passes]).run(captured).program
    with tempfile.TemporaryDirectory() as folder:
        artifacts = lowered(exact, Path(folder) / "exact"), lowered(gated, Path(folder) / "gated")
    result: dict[str, Any] = {
        "schema": "xformopt/eventful/1",
        "machine": vars(describe_machine()),
        "model": MODEL,
        "streams": STREAMS,
        "frames": FRAMES,
        "tokens": max(RECOMPUTED),
        "work_left": work_left(exact, gated),
        "answers": {f"noise {noise}": answers_at(noise, *artifacts) for noise in NOISES},
    }
    if options.time:
        result["time_over_whole"] = times(*artifacts)
    elif RESULTS.exists():
        result["time_over_whole"] = json.loads(RESULTS.read_text()).get("time_over_whole")
    RESULTS.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
