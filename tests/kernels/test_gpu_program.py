"""The program that measures on a GPU, as far as it goes without one: cases, costs, limits, its file, its models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import relative

from xformopt.kernels.triton_form import load_kernels

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import gpu_kernels
import gpu_lengths
import gpu_operands
import gpu_variants
import measure_gpu
from gpu_file import NO_GPU, GpuFile, Job, run_jobs
from gpu_operands import Cost, Peaks, cost_of, operands_of_case, widened
from kernel_cases import CASES, HALF, SINGLE, Case

TOOLS = Path(__file__).parents[2] / "tools"
HIDDEN = ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "pydantic", "safetensors", "psutil", "typer")
HIDDEN += ("rich", "jinja2", "matplotlib", "platformdirs", "tvm", "openvino", "sklearn")


def small(operator: str) -> Case:
    x = ((2, 5, 36), HALF)
    return {
        "layer_norm": Case("layer_norm", "small", (x, ((36,), HALF), ((36,), HALF)), {"eps": 1e-5}),
        "attention": Case("attention", "small", (x, x, x), {"heads": 2, "kv_heads": 2, "scale": 0.3, "causal": True}),
    }[operator]


def untuned(trials: Any) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}: {case.name}")
def test_the_operands_of_every_case_are_taken_and_cost_something(case: Case) -> None:
    args, options = operands_of_case(case, HALF, "cpu")
    kernel = load_kernels()[case.operator]
    assert kernel.accepts(*args, **options) is None
    cost = cost_of(case, args, options, kernel.plan(*args, **options).result)
    assert cost.flops > 0 or case.operator in ("merge_tokens",)
    assert cost.bytes > 0
    again, _ = operands_of_case(case, HALF, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(args, again, strict=True) if isinstance(a, torch.Tensor))


def test_packed_sequences_and_merged_tokens_make_sense() -> None:
    by_operator = {case.operator: case for case in CASES if "keys" in case.name or case.operator == "merge_tokens"}
    packed = next(case for case in CASES if case.operator == "attention_packed" and "keys" in case.name)
    _, _, _, offsets, keys = operands_of_case(packed, HALF, "cpu")[0]
    lengths = offsets.diff()
    assert offsets[0] == 0
    assert offsets[-1] == 2048
    assert lengths.min() == 0
    assert bool((keys <= lengths).all())
    _, kept, sources, destinations, _ = operands_of_case(by_operator["merge_tokens"], HALF, "cpu")[0]
    assert torch.equal(torch.cat([kept, sources], 1).sort(1).values, torch.arange(512).expand(4, 512))
    assert int(destinations.max()) < kept.shape[1]


def test_what_a_case_wants_in_float32_stays_so() -> None:
    by_name = {case.operator: case for case in CASES if "bf16" in case.name}
    assert operands_of_case(by_name["retention"], HALF, "cpu")[0][3].dtype == SINGLE
    assert operands_of_case(by_name["selective_scan"], HALF, "cpu")[0][2].dtype == SINGLE
    norm = next(case for case in CASES if case.operator == "add_rms_norm")
    assert {x.dtype for x in operands_of_case(norm, HALF, "cpu")[0]} == {HALF}


def test_costs_count_what_is_moved_and_seen() -> None:
    case = small("layer_norm")
    args, options = operands_of_case(case, HALF, "cpu")
    assert cost_of(case, args, options, args[0]).bytes == 2 * (2 * 5 * 36 * 2) + 2 * 36 * 2
    causal = small("attention")
    args, options = operands_of_case(causal, HALF, "cpu")
    # 15 of 25 pairs of a query and a key; two products of 36 channels
    assert cost_of(causal, args, options, args[0]).flops == pytest.approx(2 * 15 * 2 * 2 * 36)
    assert gpu_lengths.attention_flops(2, 5, 2, 18, True) == 2 * 15 * 2 * 2 * 36
    assert gpu_lengths.attention_flops(2, 5, 2, 18, False) == 2 * 25 * 2 * 2 * 36


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    peaks = Peaks(bytes_per_second=1e12, flops_per_second=1e14)
    assert Cost(flops=1e12, bytes=1e9).floor_ms(peaks) == pytest.approx(10.0)
    assert Cost(flops=1e9, bytes=1e9).floor_ms(peaks) == pytest.approx(1.0)


def test_more_sequences_change_the_batch_alone() -> None:
    rows = next(case for case in gpu_kernels.ROWS if case.operator == "merge_tokens")
    wide = widened(rows, 8)
    assert [value[0][0] for value in wide.operands] == [32] * 5
    assert wide.operands[0][0][1:] == rows.operands[0][0][1:]


@pytest.mark.parametrize("operator", ["layer_norm", "attention"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_a_case_is_checked_against_float64(operator: str, dtype: torch.dtype) -> None:
    entry = gpu_kernels.check_case(small(operator), dtype, "cpu", untuned)
    assert entry["relative_l2"] <= entry["allowed"]
    assert entry["same_from_run_to_run"]


def test_a_wrong_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_kernels.TOLERANCE, HALF, 1e-9)
    with pytest.raises(ValueError, match="relative L2"):
        gpu_kernels.check_case(small("layer_norm"), HALF, "cpu", untuned)


@pytest.mark.parametrize("operator", gpu_lengths.RECURRENCES)
def test_recurrences_take_one_set_of_operands(operator: str) -> None:
    q, k, v, decays = (torch.randn(2, 7, 32).to(HALF) for _ in range(4))
    args, options = gpu_lengths.recurrent_operands(operator, q, k, v, -decays.abs(), 2)
    kernel = load_kernels()[operator]
    assert kernel.accepts(*args, **options) is None
    assert kernel.plan(*args, **options).result.shape == (2, 7, 32)


def test_packs_and_block_masks_are_what_they_are_named_after() -> None:
    lengths = gpu_variants.packed_lengths(512)
    assert int(lengths.max()) == 512
    assert int(lengths.min()) == 0
    assert 0.9 * gpu_lengths.TOKENS <= int(lengths.sum()) <= gpu_lengths.TOKENS
    mask = gpu_variants.allowed_blocks(64, 0.25)
    assert bool(mask[0].diagonal().all())
    assert 0.2 < float(mask.float().mean()) < 0.3
    jobs = [job.name for job in gpu_variants.variant_jobs(Peaks(1e12, 1e14), untuned)]
    assert len(jobs) == len(set(jobs)) == 2 * (3 + 3 + 6)


def test_what_differs_from_run_to_run_is_an_error() -> None:
    runs = iter([torch.ones(3), torch.zeros(3)])
    with pytest.raises(ValueError, match="run to run equal: False"):
        gpu_variants._checked(lambda: next(runs), torch.ones(3))
    assert gpu_variants._checked(lambda: torch.ones(3), torch.ones(3))["same_from_run_to_run"]


class Ticks:
    """A clock that is a minute later whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 60.0
        return self.now


def jobs(done: list[str], broken: tuple[str, ...] = ()) -> list[Job]:
    def measure(name: str) -> dict[str, float]:
        done.append(name)
        if name in broken:
            raise RuntimeError("out of memory")
        return {"value": 1.0}

    return [Job(name, lambda n=name: measure(n)) for name in "abc"]  # type: ignore[misc]


def test_a_section_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file, done = GpuFile(tmp_path / "gpu.json"), list[str]()
    # three readings a job: `b` begins at the fourth minute, `c` would at the seventh, and may take half a minute
    assert not run_jobs(file, "rows", jobs(done), deadline=440.0, clock=Ticks())
    assert done == ["a", "b"]
    assert run_jobs(file, "rows", jobs(done), deadline=1e9, clock=Ticks())
    assert done == ["a", "b", "c"]
    assert file.read()["entries"]["rows"]["a"] == {"value": 1.0, "seconds": 60.0}
    assert run_jobs(file, "rows", jobs(done), deadline=1e9, clock=Ticks(), again=True)
    assert done == [*"abc", *"abc"]


def test_what_failed_is_written_and_tried_anew(tmp_path: Path) -> None:
    file, done = GpuFile(tmp_path / "gpu.json"), list[str]()
    assert run_jobs(file, "rows", jobs(done, broken=("b",)), deadline=1e9, clock=Ticks())
    assert file.read()["entries"]["rows"]["b"] == {"error": "RuntimeError: out of memory"}
    assert run_jobs(file, "rows", jobs(done), deadline=1e9, clock=Ticks())
    assert done == ["a", "b", "c", "b"]
    assert "error" not in file.read()["entries"]["rows"]["b"]


def test_without_a_gpu_the_file_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    file = GpuFile(tmp_path / "gpu.json")
    assert file.say_there_is_no_gpu()
    assert file.read() == {"schema": "xformopt/gpu/1", "machine": None, "note": NO_GPU, "entries": {}}
    file.start({"gpu": {"name": "NVIDIA A"}})
    file.put("machine", "copy", {"bytes_per_second": 2e12})
    assert not file.say_there_is_no_gpu()
    with pytest.raises(ValueError, match=r"results of NVIDIA A.*NVIDIA B.*--output"):
        file.start({"gpu": {"name": "NVIDIA B"}})
    with pytest.raises(ValueError, match="--section machine first"):
        measure_gpu.peaks_of(file)
    file.put("machine", "products in bf16", {"flops_per_second": 4e14})
    assert measure_gpu.peaks_of(file) == Peaks(2e12, 4e14)


def test_the_committed_file_is_empty_or_of_a_named_machine() -> None:
    content = json.loads((TOOLS / "results" / "gpu.json").read_text())
    assert set(content["entries"]) <= set(measure_gpu.SECTIONS)
    if content["machine"] is None:
        assert content["note"] == NO_GPU
        assert content["entries"] == {}
    else:
        assert content["machine"]["gpu"]["name"]


SCRIPT = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.modules.update(dict.fromkeys({HIDDEN!r}))
sys.path.append({str(TOOLS)!r})
import measure_gpu, gpu_kernels, gpu_lengths, gpu_models, gpu_variants
import torch
from xformopt.lowering.triton_export import export_kernels
from xformopt.models.zoo import find_architecture
model = find_architecture("bert-tiny").build()
inputs = gpu_models.unequal_batch(256, batch=4, length=20)
program = gpu_models.prepared(model, inputs, (gpu_models.Packing(),))
print(export_kernels(program, device="cpu").forms)
mask = inputs["attention_mask"].bool()
offsets = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
flat = inputs["input_ids"][mask], torch.arange(20).expand_as(mask)[mask], offsets
found, wanted = gpu_models.VariableBert(model)(*flat), model(**inputs)["logits"]
print(float((found - wanted).norm() / wanted.norm()))
sys.argv = ["measure_gpu.py", "--output", sys.argv[1]]
measure_gpu.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_runs_uninstalled_with_torch_and_triton_alone(tmp_path: Path) -> None:
    """A packed model in bfloat16 is captured, rewritten and exported; its rival computes the same; there is no GPU."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    forms, gap, said = done.stdout.strip().splitlines()
    assert "'attention_packed': {'kernel': 4}" in forms
    assert "'add_layer_norm': {'kernel'" in forms
    assert float(gap) < 1e-5
    assert said.startswith(NO_GPU)
    assert json.loads((tmp_path / "gpu.json").read_text())["note"] == NO_GPU


def test_relative_of_equal_tensors_is_zero() -> None:
    x = torch.ones(3)
    assert relative(x, x) == 0.0 == gpu_lengths.gap(x, x)
    assert gpu_operands.in_double(x).dtype == torch.float64
