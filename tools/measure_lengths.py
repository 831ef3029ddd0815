"""Latency and memory of one layer's token mixing against length, for each kind of attention, on ONNX Runtime.

    python tools/measure_lengths.py [--lengths 256,512,...] [--threads 2] [--rounds 3] [-o FILE]

Writes tools/results/lengths.json, which ``xformopt report`` draws with the crossovers.  All are causal, batch 1,
8 heads of width 64, fp32.  Softmax attention is measured in every form that ONNX Runtime has for it; every other
operator in its own.  Each round opens each graph in a process of its own, A B C A B C; memory is what the first run
adds to the open session.  Up to 2,048 tokens the outputs are compared with the references'.  Speed-ups are over the
form of softmax attention that is fastest at the longest length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xformopt.analysis import cost
from xformopt.lowering.onnx_export import Exported, export_onnx
from xformopt.lowering.onnx_files import CandidateFolder
from xformopt.lowering.onnx_forms import build_graph, offered_forms
from xformopt.measure.machine import describe_machine
from xformopt.measure.statistics import median_interval, percentiles, ratio_of_medians
from xformopt.program import Program
from xformopt.report.schema import BenchReport, FidelityRecord, Latency, MachineRecord, Run, Speedup

TOOLS = Path(__file__).parent
RESULTS = TOOLS / "results"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
HEADS, DEPTH = 8, 64
WIDTH = HEADS * DEPTH
SCALE = DEPTH**-0.5
BLOCK, WINDOW = 64, 256
LONGEST_COMPARED = 2048
# name: operands beside q, k and v, and the operator's line
MIXERS = {
    "softmax": ((), f"xf.attention(%q, %k, %v) {{heads={HEADS}, kv_heads={HEADS}, scale={SCALE}, causal=true}}"),
    "linear": ((), f"xf.linear_attention(%q, %k, %v) {{heads={HEADS}, causal=true}}"),
    "gated": (("gate",), f"xf.gated_linear_attention(%q, %k, %v, %gate) {{heads={HEADS}, scale={SCALE}}}"),
    "retention": (("decay",), f"xf.retention(%q, %k, %v, %decay) {{heads={HEADS}, scale={SCALE}}}"),
    "delta": (("beta",), f"xf.delta_rule(%q, %k, %v, %beta) {{heads={HEADS}, scale={SCALE}}}"),
    "local": (
        (),
        f"xf.local_attention(%q, %k, %v) {{heads={HEADS}, scale={SCALE}, window_left={WINDOW - 1}, causal=true}}",
    ),
    "block-sparse": (
        ("blocks",),
        f"xf.block_sparse_attention(%q, %k, %v, %blocks) {{heads={HEADS}, scale={SCALE}, block={BLOCK}, causal=true}}",
    ),
    "entmax": ((), f"xf.entmax_attention(%q, %k, %v) {{heads={HEADS}, scale={SCALE}, causal=true}}"),
}


@dataclass
class Mixer:
    """One graph: what is known of it before it runs, and its samples in milliseconds, by round."""

    name: str
    length: int
    flops: float
    path: Path
    expected: np.ndarray | None
    rounds: list[list[float]] = field(default_factory=list)
    memory: int = 0
    error: str | None = None
    relative_l2: float | None = None

    @property
    def median(self) -> float:
        """The median over all rounds; infinite where it failed."""
        return percentiles([x for part in self.rounds for x in part]).p50 if self.rounds else float("inf")

    def run(self, folder: Path, threads: int) -> None:
        """Run one round in a process of its own."""
        answer = in_a_process(self.path, folder, threads)
        if "error" in answer:
            self.error = answer["error"]
            return
        self.rounds.append(answer["samples_ms"])
        self.memory = max(self.memory, answer["peak_memory_bytes"])
        if self.expected is not None:
            found = np.load(folder / "output.npy")
            self.relative_l2 = float(np.linalg.norm(found - self.expected) / np.linalg.norm(self.expected))

    def record(self, base: Mixer | None, threads: int) -> Run:
        """Return the run as reports have it, compared with ``base``, which is of the same length."""
        found = Run(name=self.name, target="ort-cpu", batch=1, length=self.length, threads=threads, error=self.error)
        if not self.rounds:
            return found
        interval = median_interval(self.rounds)
        spread = percentiles([x for part in self.rounds for x in part])
        found.latency_ms = Latency(**asdict(spread), ci95=interval and (interval.low, interval.high))
        found.peak_memory_bytes, found.base_memory_bytes = self.memory, 0
        found.fidelity = FidelityRecord(relative_l2=self.relative_l2)
        if base is not None and base is not self and base.rounds:
            ratio = ratio_of_medians(base.rounds, self.rounds)
            ends = None if ratio.interval is None else (ratio.interval.low, ratio.interval.high)
            found.speedup = Speedup(over=base.name, ratio=ratio.value, ci95=ends)
        return found


def block_mask(length: int) -> torch.Tensor:
    """Return a band of four blocks, the first block, and every sixteenth: ``[1, N, N]``."""
    at = torch.arange(-(-length // BLOCK))
    back = at[:, None] - at
    return ((back >= 0) & ((back < WINDOW // BLOCK) | (at % 16 == 0)))[None]


def make_program(name: str, length: int) -> Program:
    operands, line = MIXERS[name]
    shapes = {"gate": f"f32[1,{length},{WIDTH}]", "beta": f"f32[1,{length},{HEADS}]"}
    parameters = {"decay": torch.log(1 - 2.0 ** -torch.linspace(5, 8, HEADS)), "blocks": block_mask(length)}
    given = {key: value for key, value in parameters.items() if key in operands}
    types = {"decay": f"f32[{HEADS}]", "blocks": f"bool[{','.join(map(str, parameters['blocks'].shape))}]"}
    head = [f'program "{name}" lifted', *(f"input %{x}: f32[1,{length},{WIDTH}]" for x in "qkv")]
    head += [f"input %{key}: {shapes[key]}" for key in operands if key in shapes]
    head += [f"param %{key}: {types[key]}" for key in given]
    text = "\n".join([*head, f"%o: f32[1,{length},{WIDTH}] = {line}", "return o=%o", ""])
    return Program.parse(text, parameters=given)


def make_inputs(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, gate = (torch.randn(1, length, WIDTH, generator=generator) for _ in range(4))
    # keys of length one, as the delta rule wants them
    k = torch.nn.functional.normalize(k.unflatten(-1, (HEADS, DEPTH)), dim=-1).flatten(-2)
    beta = torch.rand(1, length, HEADS, generator=generator)
    return {"q": q, "k": k, "v": v, "gate": torch.nn.functional.logsigmoid(gate) / 16, "beta": beta}


def candidates(length: int, folder: Path) -> Iterator[Mixer]:
    """Write every graph and yield what is known of it before it runs."""
    inputs = make_inputs(length)
    arrays = folder / "inputs.npz"
    np.savez(arrays, **{name: value.numpy() for name, value in inputs.items()})
    for name in MIXERS:
        program = make_program(name, length)
        exported = export_onnx(program)
        operator = next(key.removeprefix("xf.") for key in cost(program).operators if key.startswith("xf."))
        expected = None
        if length <= LONGEST_COMPARED:
            given = {key: value for key, value in inputs.items() if key in program.input_names}
            expected = program.run(given)["o"].numpy()
        # softmax in every form; of the others, attention's own is measured already
        forms = offered_forms(exported).get(operator, ()) if name == "softmax" else ()
        for form in forms or (None,):
            kept = folder / f"{name}-{form}"
            kept.mkdir()
            title = f"{name}, {form.replace('_', ' ')}" if form else name
            path = write(exported, {operator: form} if form else {}, kept)
            yield Mixer(title, length, cost(program).flops, path, expected)


def write(exported: Exported, choice: Mapping[str, str], folder: Path) -> Path:
    return Path(CandidateFolder(folder).write(build_graph(exported, choice).model))


def measure_length(length: int, threads: int, rounds: int) -> list[Mixer]:
    with tempfile.TemporaryDirectory(prefix="xformopt-") as scratch:
        folder = Path(scratch)
        mixers = list(candidates(length, folder))
        for _ in range(rounds):
            for mixer in mixers:
                if mixer.error is None:
                    mixer.run(folder, threads)
    for mixer in mixers:
        print(f"{length:6} {mixer.name:40} {mixer.median:10.2f} ms {mixer.error or ''}", flush=True)
    return mixers


def in_a_process(path: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Run one graph in a fresh process and return its samples and its memory, or why it failed."""
    command = [sys.executable, str(TOOLS / "run_graph.py"), str(path), str(folder), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it was killed"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "lengths.json")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    lengths = sorted(map(int, chosen.lengths.split(",")))
    found = {length: measure_length(length, chosen.threads, chosen.rounds) for length in lengths}
    base = min((m for m in found[lengths[-1]] if m.name.startswith("softmax")), key=lambda mixer: mixer.median).name
    runs = []
    for mixers in found.values():
        compared = next((mixer for mixer in mixers if mixer.name == base), None)
        runs += [mixer.record(compared, chosen.threads) for mixer in mixers]
    setting = {"heads": HEADS, "head_width": DEPTH, "window": WINDOW, "block": BLOCK, "rounds": chosen.rounds}
    setting |= {"interleaved": True, "process_per_run": True}
    machine = MachineRecord(**asdict(describe_machine()))
    source = "the token mixing of one layer"
    BenchReport(machine=machine, runs=runs, source=source, protocol=setting).to_json(chosen.output)


if __name__ == "__main__":
    main()
