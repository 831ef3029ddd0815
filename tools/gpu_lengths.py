"""Attention and recurrences over lengths, beside what torch and flash-linear-attention offer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gpu_clock import milliseconds
from gpu_file import Job
from gpu_operands import Cost, Peaks, bytes_of
from kernel_cases import HALF
from torch.nn import functional

from xformopt.kernels.definition import load_operators
from xformopt.kernels.triton_form import Trial, load_kernels, use_tiles

__all__ = [
    "CHANNELS",
    "LENGTHS",
    "TOKENS",
    "WIDTHS",
    "Call",
    "Choose",
    "attention_flops",
    "attention_jobs",
    "gap",
    "recurrent_jobs",
    "timed",
    "unit_heads",
]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
WIDTHS = (64, 128)
# of all sequences together, and of all heads
TOKENS, CHANNELS = 32768, 2048
# the plain formula holds every logit: of one sequence up to this length
_MOST_PLAIN = 4096
RECURRENCES = ("gated_linear_attention", "retention", "linear_attention", "ssd", "delta_rule")

Call = Callable[[], object]
Choose = Callable[[Mapping[str, Trial]], dict[str, Any]]


def attention_flops(batch: int, length: int, heads: int, width: int, causal: bool) -> float:
    """Return the operations of both products over the pairs that are seen; a multiply-add is two."""
    pairs = length * (length + 1) / 2 if causal else float(length) ** 2
    return 4.0 * batch * heads * width * pairs


def attention_jobs(peaks: Peaks, choose: Choose) -> Iterator[Job]:
    """Yield attention at every length and width, with and without a causal mask, in bfloat16."""
    for width in WIDTHS:
        for causal in (False, True):
            for length in LENGTHS:
                name = f"{'causal' if causal else 'all keys'}, {width} wide, {length} tokens"
                yield Job(name, lambda w=width, c=causal, n=length: _attention(peaks, choose, w, n, c))  # type: ignore[misc]


def _attention(peaks: Peaks, choose: Choose, width: int, length: int, causal: bool) -> dict[str, Any]:
    B, H = max(1, TOKENS // length), CHANNELS // width
    q, k, v = (torch.randn(B, length, CHANNELS, device="cuda").to(HALF) for _ in range(3))
    options = {"heads": H, "kv_heads": H, "scale": width**-0.5, "causal": causal}
    kernel = load_kernels()["attention"]
    assert kernel.trial is not None
    trial = kernel.trial(q, k, v, **options)
    tiles = choose({trial.key: trial})
    apart = [x.unflatten(2, (H, width)).transpose(1, 2) for x in (q, k, v)]

    def torch_own() -> torch.Tensor:
        return functional.scaled_dot_product_attention(*apart, is_causal=causal)

    systems: dict[str, Call] = {"ours": lambda: kernel.plan(q, k, v, **options).run(), "sdpa": torch_own}
    if length <= _MOST_PLAIN:
        # the formula in torch's own operators, which Inductor fuses as far as it can
        formula = torch.compile(lambda: load_operators()["attention"].reference(q, k, v, **options), dynamic=False)
        systems["torch.compile"] = formula
    expected = torch_own().transpose(1, 2).flatten(2)
    flops = attention_flops(B, length, H, width, causal)
    with use_tiles(tiles):
        distance = gap(kernel.plan(q, k, v, **options).run(), expected)
        found = timed(systems, Cost(flops, bytes_of(q, k, v, q)), peaks)
    return {"batch": B, "heads": H, "tile": list(tiles[trial.key]), "relative_l2_to_sdpa": distance, **found}


def recurrent_jobs(peaks: Peaks) -> Iterator[Job]:
    """Yield every recurrence at every length and width, beside causal flash attention of the same shape."""
    for operator in RECURRENCES:
        for width in WIDTHS:
            for length in LENGTHS:
                name = f"{operator}, {width} wide, {length} tokens"
                yield Job(name, lambda o=operator, w=width, n=length: _recurrent(peaks, o, w, n))  # type: ignore[misc]


def _recurrent(peaks: Peaks, operator: str, width: int, length: int) -> dict[str, Any]:
    B, H = max(1, TOKENS // length), CHANNELS // width
    q, k, v = (torch.randn(B, length, CHANNELS, device="cuda").to(HALF) for _ in range(3))
    apart = [x.unflatten(2, (H, width)) for x in (q, k, v)]
    decays = -0.1 * torch.rand(B, length, CHANNELS, device="cuda").to(HALF)
    args, options = recurrent_operands(operator, q, k, v, decays, H)
    kernel = load_kernels()[operator]
    heads_first = [x.transpose(1, 2) for x in apart]
    systems: dict[str, Call] = {
        "ours": lambda: kernel.plan(*args, **options).run(),
        "flash attention": lambda: functional.scaled_dot_product_attention(*heads_first, is_causal=True),
    }
    if length <= _MOST_PLAIN:
        reference = load_operators()[operator].reference
        systems["torch.compile"] = torch.compile(lambda: reference(*args, **options), dynamic=False)
    if (rival := _flash_linear_attention(operator, apart, decays.unflatten(2, (H, width)))) is not None:
        systems["flash-linear-attention"] = rival
    flops = float(load_operators()[operator].flops(*args, **options))
    return {"batch": B, "heads": H, **timed(systems, Cost(flops, bytes_of(q, k, v, q)), peaks)}


def recurrent_operands(
    operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decays: torch.Tensor, heads: int
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Return the operands of one recurrence over the same queries, keys and values, ``[B, T, C]``."""
    if operator == "gated_linear_attention":
        return (q, k, v, decays), {"heads": heads}
    if operator == "retention":
        return (q, k, v, decays[0, 0, :heads].float()), {"heads": heads}
    if operator == "linear_attention":
        return (q, k, v), {"heads": heads, "causal": True}
    width = q.shape[2] // heads
    if operator == "delta_rule":
        return (q, unit_heads(k, heads), v, decays[..., :heads].exp()), {"heads": heads}
    steps, rate = decays[..., :heads].neg(), -torch.ones(heads, device=q.device)
    return (v, steps, rate, k[..., :width], q[..., :width]), {"heads": heads}


def unit_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring each head of ``[B, T, C]`` to length one."""
    parts: torch.Tensor = x.unflatten(2, (heads, -1))
    return functional.normalize(parts, dim=-1).flatten(2)


def _flash_linear_attention(operator: str, apart: list[torch.Tensor], decays: torch.Tensor) -> Call | None:
    """Return the same recurrence of flash-linear-attention, where it is installed and has it."""
    if importlib.util.find_spec("fla") is None:
        return None
    q, k, v = apart
    if operator == "gated_linear_attention":
        from fla.ops.gla import chunk_gla

        return lambda: chunk_gla(q, k, v, decays)
    if operator == "delta_rule":
        from fla.ops.delta_rule import chunk_delta_rule

        unit, rates = functional.normalize(k, dim=-1), decays[..., 0].exp().contiguous()
        return lambda: chunk_delta_rule(q, unit, v, rates, scale=1.0)
    if operator == "retention":
        from fla.ops.simple_gla import chunk_simple_gla

        steps = decays[..., 0].float().contiguous()
        return lambda: chunk_simple_gla(q, k, v, steps)
    return None


def timed(systems: Mapping[str, Call], cost: Cost, peaks: Peaks) -> dict[str, Any]:
    """Return the time of every system, and ours beside the least time and the rivals; a rival may fail."""
    times: dict[str, Any] = {}
    for name, call in systems.items():
        try:
            times[name], _ = milliseconds(call)
        except Exception as error:
            if name == "ours":
                raise
            times[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    floor = cost.floor_ms(peaks)
    ratios = {name: taken / times["ours"] for name, taken in times.items() if isinstance(taken, float)}
    return {"milliseconds": times, "ours_over_floor": floor / times["ours"], "speedup_over": ratios}


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
