"""Attention over packed sequences, over allowed blocks, and with entmax, beside what torch offers for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_file import Job
from gpu_lengths import CHANNELS, TOKENS, WIDTHS, Call, Choose, gap, timed
from gpu_operands import Cost, Peaks, bytes_of
from kernel_cases import HALF
from torch.nn import functional

from xformopt.kernels.definition import load_operators
from xformopt.kernels.triton_form import load_kernels, use_tiles

__all__ = ["allowed_blocks", "packed_lengths", "variant_jobs"]

# the longest sequence of a pack; lengths are uniform from a fifth of it
LONGEST = (512, 2048, 8192)
# tokens of a sequence, and the share of its blocks that a query sees
SPARSE = ((4096, 0.25), (16384, 0.25), (16384, 0.1))
BLOCK = 64
# factors of scores: the larger, the fewer keys have any weight
SPREADS = (1.0, 4.0)
ENTMAX = (512, 2048, 8192)
# the plain formula holds every weight
_MOST_PLAIN = 2048


def variant_jobs(peaks: Peaks, choose: Choose) -> Iterator[Job]:
    """Yield all of them, in bfloat16."""
    for width in WIDTHS:
        for longest in LONGEST:
            name = f"packed, {width} wide, up to {longest} tokens"
            yield Job(name, lambda w=width, n=longest: _packed(peaks, choose, w, n))  # type: ignore[misc]
        for length, share in SPARSE:
            name = f"blocks, {width} wide, {length} tokens, {share:.0%} of them seen"
            yield Job(name, lambda w=width, n=length, s=share: _sparse(peaks, w, n, s))  # type: ignore[misc]
        for length in ENTMAX:
            for spread in SPREADS:
                name = f"entmax, {width} wide, {length} tokens, spread {spread:g}"
                yield Job(name, lambda w=width, n=length, s=spread: _entmax(peaks, w, n, s))  # type: ignore[misc]


def packed_lengths(longest: int, tokens: int = TOKENS) -> torch.Tensor:
    """Return lengths of sequences, one of them ``longest`` and one empty, that together have ``tokens`` or less."""
    count = max(2, round(tokens / (0.6 * longest)))
    lengths = torch.linspace(0.2 * longest, longest, count).round().long()
    while int(lengths.sum()) > tokens:
        lengths = lengths[1:]
    return torch.cat([lengths.new_zeros(1), lengths])


def allowed_blocks(count: int, share: float) -> torch.Tensor:
    """Return which blocks of keys a block of queries sees, ``[1, count, count]``: its own, and others by chance."""
    drawn = torch.rand(1, count, count, generator=torch.Generator().manual_seed(0)) < share
    return drawn | torch.eye(count, dtype=torch.bool)


def _packed(peaks: Peaks, choose: Choose, width: int, longest: int) -> dict[str, Any]:
    lengths, H = packed_lengths(longest), CHANNELS // width
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).cuda()
    q, k, v = (torch.randn(1, int(lengths.sum()), CHANNELS, device="cuda").to(HALF) for _ in range(3))
    options = {"heads": H, "kv_heads": H, "scale": width**-0.5}
    kernel = load_kernels()["attention_packed"]
    trial = kernel.trial(q, k, v, offsets, **options) if kernel.trial is not None else None
    apart = [x[0].unflatten(1, (H, width)) for x in (q, k, v)]
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in apart]
    rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths.tolist()), batch_first=True) for x in apart]
    padded = [x.transpose(1, 2) for x in rows]
    exists = (torch.arange(padded[0].shape[2]) < lengths.unsqueeze(1)).cuda()[:, None, None, :]
    # an empty sequence has no key: what it gets is not looked at
    exists[lengths == 0] = True

    def variable() -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        ends = offsets.int()
        return varlen_attn(*apart, ends, ends, longest, longest)

    def inside() -> torch.Tensor:
        return functional.scaled_dot_product_attention(*nested).transpose(1, 2).values()

    with use_tiles({} if trial is None else choose({trial.key: trial})):
        ours: Call = lambda: kernel.plan(q, k, v, offsets, **options).run()  # noqa: E731
        systems = {
            "ours": ours,
            "torch, variable length": variable,
            "torch, nested": inside,
            "torch, padded": lambda: functional.scaled_dot_product_attention(*padded, attn_mask=exists),
        }
        flops = 4.0 * CHANNELS * float((lengths.double() ** 2).sum())
        checked = _checked(ours, inside().flatten(1).unsqueeze(0))
        return {
            "sequences": len(lengths),
            "tokens": int(lengths.sum()),
            **checked,
            **timed(systems, Cost(flops, bytes_of(q, k, v, q)), peaks),
        }


def _sparse(peaks: Peaks, width: int, length: int, share: float) -> dict[str, Any]:
    B, H = max(1, TOKENS // length), CHANNELS // width
    q, k, v = (torch.randn(B, length, CHANNELS, device="cuda").to(HALF) for _ in range(3))
    mask = allowed_blocks(length // BLOCK, share).cuda()
    options = {"heads": H, "scale": width**-0.5, "block": BLOCK}
    plan = load_kernels()["block_sparse_attention"].plan
    apart = [x.unflatten(2, (H, width)).transpose(1, 2).contiguous() for x in (q, k, v)]
    ours: Call = lambda: plan(q, k, v, mask, **options).run()  # noqa: E731
    systems: dict[str, Call] = {
        "ours": ours,
        "all blocks, sdpa": lambda: functional.scaled_dot_product_attention(*apart),
        "flex attention": _flexible(apart, mask),
    }
    dense = mask[0].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    expected = functional.scaled_dot_product_attention(*(x[:1, :1] for x in apart), attn_mask=dense)
    checked = _checked(lambda: plan(*(x[:1, :, :width] for x in (q, k, v)), mask, **{**options, "heads": 1}).run(),
                       expected[:, 0])  # fmt: skip
    seen = float(mask.float().mean())
    cost = Cost(4.0 * B * length**2 * CHANNELS * seen, bytes_of(q, k, v, q))
    return {"batch": B, "blocks_seen": seen, **checked, **timed(systems, cost, peaks)}


def _flexible(apart: list[torch.Tensor], mask: torch.Tensor) -> Call:
    """Return torch's own block-sparse attention, compiled; it fails when it is called where there is none."""

    def call() -> torch.Tensor:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        if not prepared:
            counts = mask.sum(-1, dtype=torch.int32)[None]
            order = mask.int().argsort(-1, descending=True, stable=True).int()[None]
            blocks = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=BLOCK)
            compiled = torch.compile(flex_attention, dynamic=False)
            prepared.append(lambda: compiled(*apart, block_mask=blocks))
        return prepared[0]()

    prepared: list[Callable[[], torch.Tensor]] = []
    return call


def _entmax(peaks: Peaks, width: int, length: int, spread: float) -> dict[str, Any]:
    B, H = max(1, TOKENS // length), CHANNELS // width
    q, k, v = (torch.randn(B, length, CHANNELS, device="cuda").to(HALF) for _ in range(3))
    options = {"heads": H, "scale": spread * width**-0.5}
    plan, reference = load_kernels()["entmax_attention"].plan, load_operators()["entmax_attention"].reference
    apart = [x.unflatten(2, (H, width)).transpose(1, 2) for x in (q, k, v)]
    ours: Call = lambda: plan(q, k, v, **options).run()  # noqa: E731
    systems: dict[str, Call] = {
        "ours": ours,
        "softmax, sdpa": lambda: functional.scaled_dot_product_attention(*apart, scale=options["scale"]),
    }
    if length <= _MOST_PLAIN:
        systems["torch.compile"] = torch.compile(lambda: reference(q, k, v, **options), dynamic=False)
    one = [x[:1, :, :width] for x in (q, k, v)]
    expected = reference(*(x.double() for x in one), **{**options, "heads": 1})
    checked = _checked(lambda: plan(*one, **{**options, "heads": 1}).run(), expected)
    # both products once; that keys are read again to find thresholds is the method's cost
    cost = Cost(4.0 * B * length**2 * CHANNELS, bytes_of(q, k, v, q))
    return {"batch": B, **checked, **timed(systems, cost, peaks)}


def _checked(call: Call, expected: torch.Tensor) -> dict[str, Any]:
    """Return how far a call is from what is expected.

    Raises:
        ValueError: it is too far, or differs from run to run.

    """
    first, second = call(), call()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    distance, is_same = gap(first, expected), torch.equal(first, second)
    if not is_same or not distance <= 2e-2:
        raise ValueError(f"relative L2 of {distance}, where 0.02 is allowed; run to run equal: {is_same}")
    return {"relative_l2": distance, "same_from_run_to_run": is_same}
