"""Every kernel against float64, and those that work on rows and linear layers against the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gpu_clock import milliseconds
from gpu_file import Job
from gpu_operands import Peaks, cost_of, in_double, operands_of_case, widened
from kernel_cases import CASES, HALF, NAMES, SINGLE, Case

from xformopt.kernels.definition import load_operators
from xformopt.kernels.triton_form import Trial, load_kernels, use_tiles

__all__ = ["ROWS", "TOLERANCE", "check_case", "numeric_jobs", "row_jobs"]

Choose = Callable[[Mapping[str, Trial]], dict[str, Any]]

# relative L2 against float64
TOLERANCE = {SINGLE: 1e-5, HALF: 1e-2}
# where tensor cores keep sums of products in fewer bits than float32 has, whatever the operands are in
COARSER = {"float8_linear": 1e-3}
# operators with a section of their own
_APART = {"attention", "attention_packed", "block_sparse_attention", "retention", "ssd", "linear_attention"}
_APART |= {"gated_linear_attention", "delta_rule", "delta_rule_resumed", "entmax_attention"}
ROWS = tuple(case for case in CASES if case.operator not in _APART)
# times the sequences of a case: what is moved is then larger than the cache
WIDER = 32


def numeric_jobs(tune: Choose, device: str = "cuda") -> Iterator[Job]:
    """Yield every case in float32 and in bfloat16."""
    for case in CASES:
        for dtype in TOLERANCE:
            name = f"{case.operator}: {case.name}: in {NAMES[dtype]}"
            yield Job(name, lambda c=case, d=dtype: check_case(c, d, device, tune))  # type: ignore[misc]


def check_case(case: Case, dtype: torch.dtype, device: str, tune: Choose) -> dict[str, Any]:
    """Run one case twice over NaN, and compare with the definition in float64.

    Raises:
        ValueError: what was computed is wrong, or differs from run to run.

    """
    args, options = operands_of_case(case, dtype, device)
    kernel = load_kernels()[case.operator]
    if (reason := kernel.accepts(*args, **options)) is not None:
        return {"not_taken": reason}
    if device == "cuda" and torch.cuda.get_device_capability() < kernel.capability:
        return {"not_taken": f"the GPU is older than {kernel.capability}"}
    trial = kernel.trial(*args, **options) if kernel.trial is not None else None
    with use_tiles(tune({trial.key: trial}) if trial is not None else {}):
        runs = [_run(kernel.plan(*args, **options)) for _ in range(2)]
    exact = load_operators()[case.operator].reference(
        *map(in_double, args), **{name: in_double(value) for name, value in options.items()}
    )
    expected = exact if isinstance(exact, tuple) else (exact,)
    gaps = [
        float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
        for found, wanted in zip(runs[0], expected, strict=True)
    ]
    is_same = all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    allowed = max(TOLERANCE[dtype], COARSER.get(case.operator, 0.0))
    if not is_same or not all(gap <= allowed for gap in gaps):
        raise ValueError(f"relative L2 of {gaps}, where {allowed} is allowed; run to run equal: {is_same}")
    return {"relative_l2": max(gaps), "allowed": allowed, "same_from_run_to_run": is_same}


def _run(plan: Any) -> tuple[torch.Tensor, ...]:
    plan.spoil()
    plan.run()
    return tuple(result.clone() for result in plan.results)


def row_jobs(peaks: Peaks, tune: Choose) -> Iterator[Job]:
    """Yield the cases of rows and linear layers, with more sequences, in the dtype the case is written in."""
    for case in ROWS:
        yield Job(f"{case.operator}: {case.name}", lambda c=case: _measure_rows(c, peaks, tune))  # type: ignore[misc]


def _measure_rows(case: Case, peaks: Peaks, tune: Choose) -> dict[str, Any]:
    wide = widened(case, WIDER)
    dtype = SINGLE if "fp32" in case.name else HALF
    args, options = operands_of_case(wide, dtype, "cuda")
    kernel, operator = load_kernels()[case.operator], load_operators()[case.operator]
    trial = kernel.trial(*args, **options) if kernel.trial is not None else None
    with use_tiles(tune({trial.key: trial}) if trial is not None else {}):
        plan = kernel.plan(*args, **options)
        taken, from_graph = milliseconds(plan.run)
    cost = cost_of(wide, args, options, plan.result)
    entry: dict[str, Any] = {
        "milliseconds": {"ours": taken},
        "from_graph": from_graph,
        "gbytes_per_second": cost.bytes / taken / 1e6,
        "tflops_per_second": cost.flops / taken / 1e9,
        "ours_over_floor": cost.floor_ms(peaks) / taken,
    }
    try:
        compiled = torch.compile(operator.reference, dynamic=False)
        entry["milliseconds"]["torch.compile"], _ = milliseconds(lambda: compiled(*args, **options))
    # what Inductor cannot compile is no rival
    except Exception as error:
        entry["milliseconds"]["torch.compile"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return entry
