"""Measure padding-free execution: ours packed against ours padded and the peers, on batches of unequal lengths.

    python tools/measure_packing.py [--rounds 10] [--threads 2] [MODEL ...]     writes tools/results/packing.json

BERT-base (random weights), batch 16, lengths uniform with a mean of 0.6 of 256, one of them 256; its peers as in
``measure_exact``.  MiniLM on real English sentences of mixed length, batches of 32 as they come, each padded to its
longest; sentences per second, without tokenizing, beside ONNX Runtime (with its optimizer, too) and OpenVINO on
torch's export, and sentence-transformers.  That one is installed into an environment of its own in the user's cache
folder; what fails is printed.  Every system runs in a process of its own, rounds interleaved; embeddings are compared
before any time counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch

sys.path.append(str(Path(__file__).parent))
from measure_exact import export_peers, export_with_torch, optimize_with_onnxruntime
from measure_int8 import reporting, run
from reference_models import REFERENCE, dynamic_axes
from sentences import sentences

import xformopt as xo
from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.capture.huggingface import minilm_directory
from xformopt.measure.machine import describe_machine
from xformopt.measure.statistics import median_interval, ratio_of_medians
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.pipeline.recipes import load_recipe
from xformopt.pipeline.run import describe
from xformopt.program import Program

TOOLS = Path(__file__).parent
RESULT = TOOLS / "results" / "packing.json"
BATCH, LENGTH, MEAN = 16, 256, 0.6
SENTENCES, SENTENCE_BATCH = 512, 32
OURS = {"xformopt padded": (), "xformopt packed": ("packing",)}


class MeanPooled(torch.nn.Module):
    """The mean of a text model's hidden states over the tokens that are not padding."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``{"pooled": [B, C]}``."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = next(iter(found.values())) if isinstance(found, dict) else found
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return {"pooled": (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)}


def unequal_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    """Return ids and a mask whose lengths are uniform around ``MEAN`` of ``LENGTH``, the longest of them ``LENGTH``."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace((2 * MEAN - 1) * LENGTH, LENGTH, BATCH).round().long()
    lengths = lengths[torch.randperm(BATCH, generator=generator)]
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def build_ours(program: Program, folder: Path, batch: int, length: int) -> dict[str, Path]:
    """Lower the exact recipe with and without packing, by measurement at the given sizes."""
    made = {}
    for label, steps in OURS.items():
        result = Pipeline((*load_recipe("exact"), *(parse_pass(step) for step in steps))).run(program)
        history = [describe(record) for record in result.history]
        artifact = xo.lower(result.program, captured=program, history=history, sizes={"batch": batch, "length": length})
        made[label] = folder / label.replace(" ", "-")
        artifact.save(made[label], program=False)
    return made


def measure_bert(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Latency of one batch on BERT-base."""
    text, example = REFERENCE["bert-base"][0]()
    model = MeanPooled(text).eval()
    inputs = unequal_batch(int(example["input_ids"].max()) + 1)
    axes = dynamic_axes("bert-base", inputs)
    program = xo.capture(model, inputs, axes)
    paths = build_ours(program, folder, BATCH, LENGTH)
    ours = [Candidate(label, "ort-cpu", path) for label, path in paths.items()]
    candidates = [*ours, *export_peers("bert-base", model, inputs, axes, folder)]
    reference = {key: value.numpy() for key, value in program.run(inputs).items()}
    arrays = {key: value.numpy() for key, value in inputs.items()}
    del text, model, program
    settings = BenchSettings(threads=threads, rounds=rounds, over="xformopt padded", profile_rounds=2)
    report = run_bench(candidates, arrays, reference, settings=settings, source="bert-base")
    for row in report.runs:
        p50 = row.latency_ms.p50 if row.latency_ms else float("nan")
        ratio = f"{row.speedup.ratio:.2f}x" if row.speedup else ""
        print(f"bert-base {row.name:28} {p50:9.1f} ms {ratio}  {row.error or ''}", flush=True)
    kept = float(inputs["attention_mask"].float().mean())
    found: dict[str, Any] = {"tokens_kept": kept, **json.loads(report.model_dump_json(by_alias=True))}
    return found


def measure_minilm(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Sentences per second on MiniLM."""
    model, example = REFERENCE["minilm"][0]()
    axes = dynamic_axes("minilm", example)
    program = xo.capture(model, example, axes)
    batches = tokenize(sentences(SENTENCES), list(program.input_names))
    arrays = folder / "batches.npz"
    np.savez(arrays, **{f"{i}.{name}": value for i, batch in enumerate(batches) for name, value in batch.items()})
    length = max(batch["input_ids"].shape[1] for batch in batches)
    systems = {
        label: (sys.executable, "ort-cpu", path)
        for label, path in build_ours(program, folder, SENTENCE_BATCH, length).items()
    }
    exported = export_with_torch(model, example, axes, folder / "dynamo.onnx")
    systems["onnxruntime torch export"] = (sys.executable, "ort-cpu", exported)
    with reporting("minilm", "onnxruntime optimizer"):
        optimized = folder / "optimizer.onnx"
        optimize_with_onnxruntime("minilm", model, exported, optimized)
        systems["onnxruntime optimizer"] = (sys.executable, "ort-cpu", optimized)
    systems["openvino dynamic"] = (sys.executable, "openvino-cpu", exported)
    with reporting("minilm", "sentence-transformers"):
        systems["sentence-transformers"] = (str(peer_environment()), "sentence-transformers", minilm_directory())
    reference = np.concatenate([program_embeddings(program, batch) for batch in batches])
    seconds, losses = race(systems, arrays, folder, reference, rounds, threads)
    rows = []
    for name, taken in seconds.items():
        interval = median_interval([[value] for value in taken])
        ratio = ratio_of_medians([[v] for v in seconds["xformopt padded"]], [[v] for v in taken])
        per_second = SENTENCES / float(np.median(taken))
        print(f"minilm {name:28} {per_second:8.1f} sentences/s {ratio.value:.2f}x", flush=True)
        rows.append(
            {
                "name": name,
                "sentences_per_second": per_second,
                "ci95": interval and [SENTENCES / interval.high, SENTENCES / interval.low],
                "speedup": {"over": "xformopt padded", "ratio": ratio.value},
                "relative_l2": losses[name],
                "samples_s": taken,
            }
        )
    kept = np.concatenate([batch["attention_mask"].reshape(-1) for batch in batches]).mean()
    return {"sentences": SENTENCES, "batch": SENTENCE_BATCH, "tokens_kept": float(kept), "runs": rows}


def tokenize(lines: list[str], names: list[str]) -> list[dict[str, np.ndarray]]:
    """Return batches of sentences as they come, each padded to its longest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    batches = []
    for start in range(0, len(lines), SENTENCE_BATCH):
        found = tokenizer(lines[start : start + SENTENCE_BATCH], padding=True, truncation=True, return_tensors="np")
        batches.append({name: found[name].astype(np.int64) for name in names})
    return batches


def program_embeddings(program: Program, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return what the captured program makes of one batch."""
    found = program.run({name: torch.from_numpy(value) for name, value in batch.items()})
    embedding: np.ndarray = found["sentence_embedding"].numpy()
    return embedding


def race(
    systems: dict[str, tuple[str, str, Path]],
    arrays: Path,
    folder: Path,
    reference: np.ndarray,
    rounds: int,
    threads: int,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run passes of all systems in turn; return the seconds of each, and how far its embeddings are off."""
    workers: dict[str, subprocess.Popen[str]] = {}
    losses: dict[str, float] = {}
    for number, (name, (python, system, path)) in enumerate(systems.items()):
        output = folder / f"embeddings-{number}.npy"
        command = [python, "-P", TOOLS / "encode_batches.py", system, path, arrays, threads, output]
        worker = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            print(f"minilm: {name} fails: its process ended with {worker.wait()}", file=sys.stderr)
            continue
        difference = np.linalg.norm(np.load(output) - reference) / np.linalg.norm(reference)
        workers[name], losses[name] = worker, float(difference)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None  # noqa: PT018
            worker.stdin.write("pass\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return seconds, losses


def peer_environment() -> Path:
    """Return the Python of an environment with sentence-transformers and the torch of this one."""
    version = torch.__version__.split("+")[0]
    folder = platformdirs.user_cache_path("xformopt") / f"sentence-transformers-torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        run([python, "-m", "pip", "install", "--quiet", f"torch=={version}", "sentence-transformers"])
        (folder / "ready").touch()
    return python


def main() -> None:
    """Measure the models named on the command line, or both, and put them into one file."""
    measures = {"bert-base": measure_bert, "minilm": measure_minilm}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*measures, []], metavar="MODEL", help=", ".join(measures))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found |= {"schema": "xformopt/packing/1", "machine": asdict(describe_machine())}
    for name in options.models or measures:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measures[name](Path(folder), options.rounds, options.threads)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
