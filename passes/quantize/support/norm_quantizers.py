"""Quantizers per channel behind norms, made one quantizer per tensor without changing the program's function.

A norm's channels have ranges of their own: ``codes = round(x_c / s_c) + z_c``.  With ``s~ = mean(s)``,
``z~ = round(mean(z))``, ``r = s / s~`` and ``t = z - z~``, the norm's output becomes ``x' = (x + s t) / r``, which has
the same codes by the one quantizer (s~, z~): ``x' / s~ + z~ = x / s + z``; its readers' parameters take r and s t back.

RepQ-ViT (Li et al., arXiv 2212.08254, section 3.2), RepQuant (arXiv 2402.05628, with ranges clipped on either side).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from xformopt.match import is_call, operand, xf
from xformopt.passes.quantize.support.channel_scaling import ChannelAffine, norm_outputs, scaling_rule
from xformopt.passes.quantize.support.low_bit import Prepared, Uniform
from xformopt.passes.samples import sample_rows
from xformopt.passes.weights import is_skipped
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Reject, rewrite

__all__ = ["clipped_ranges", "quantize_norms", "uniform_of"]

# parts of the full range by which either end may move inwards
_CUTS = tuple(step / 40 for step in range(19))
_ROUNDS = 2
# of the mean: narrower channels would need codes, and so shifts, that no float holds well
_NARROWEST = 0.01


def quantize_norms(
    program: Program, context: Context, *, bits: int, skip: Sequence[str], clip: bool = True
) -> Prepared:
    """Rewrite every norm that linear layers read; the settled quantizers are by the name of its new output.

    Where something else reads the norm, too, it gets the original value by an explicit product per channel.  A norm
    without a bias to hold the shift (RMSNorm) gets symmetric quantizers, all with one zero point.

    Args:
        program: Lifted or later.
        context: With calibration data.
        bits: Of a code.
        skip: Norms that only layers named here read stay as they are.
        clip: Choose ranges of least squared error within those seen.

    """
    centered = _centered(program)
    wanted = [name for name in norm_outputs(program) if _is_read(program, name, skip)]
    rows = sample_rows(program, context.calibration, wanted) if wanted else {}
    settled: list[Uniform] = []

    def choose(name: str, weights: Sequence[torch.Tensor]) -> ChannelAffine | Reject:
        channels = rows[name].t().double()
        has_bias = name in centered
        found = _per_channel(channels, bits, clip) if has_bias else _symmetric(channels, bits)
        if isinstance(found, Reject):
            return found
        scale, zero = found
        shared = Uniform(bits, float(scale.mean().float()), int(zero.mean().round()))
        settled.append(shared)
        shift = scale * (zero - shared.zero)
        return ChannelAffine(scale / shared.scale, shift if has_bias else None)

    rule = scaling_rule(wanted, choose, restore=True)
    done = rewrite(program, {"reparameterize-norm": rule}, sweeps=1)
    nodes = {node.name: node for node in done.program.nodes()}
    by_value: dict[str, Uniform] = {}
    for fired, quantizer in zip(done.fired, settled, strict=True):
        changed = [nodes[name] for name in fired.after.outputs]
        reader = next(node for node in changed if is_call(node, xf.linear, xf.linear_activation))
        by_value[operand(reader).name] = quantizer
    return Prepared(done.program, by_value, done.fired, done.rejected)


def _centered(program: Program) -> frozenset[str]:
    """Return the names of the outputs of norms that have a bias, or can get one."""
    names = set(norm_outputs(program))
    found = set()
    for value in program.nodes():
        norm = operand(value) if value.target is operator.getitem else value
        if value.name in names and is_call(norm, xf.layer_norm, xf.add_layer_norm):
            found.add(value.name)
    return frozenset(found)


def _is_read(program: Program, name: str, skip: Sequence[str]) -> bool:
    value = next(node for node in program.nodes() if node.name == name)
    layers = [user for user in value.users if is_call(user, xf.linear, xf.linear_activation)]
    return any(not is_skipped(layer, skip) for layer in layers)


def _per_channel(channels: torch.Tensor, bits: int, clip: bool) -> tuple[torch.Tensor, torch.Tensor] | Reject:
    """Return scale and zero point of every channel, float64; ``channels`` is ``[C, N]``."""
    if (constant := _constant_channel(channels)) is not None:
        return constant
    if clip:
        low, high = clipped_ranges(channels, bits)
    else:
        low, high = channels.amin(1), channels.amax(1)
    return _wide((high - low) / (2**bits - 1), low)


def _wide(scale: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.maximum(scale, _NARROWEST * scale.mean())
    return scale, (-low / scale).round()


def _symmetric(channels: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor] | Reject:
    if (constant := _constant_channel(channels)) is not None:
        return constant
    scale = channels.abs().amax(1) / (2 ** (bits - 1) - 1)
    scale = torch.maximum(scale, _NARROWEST * scale.mean())
    return scale, torch.full_like(scale, 2 ** (bits - 1))


def _constant_channel(channels: torch.Tensor) -> Reject | None:
    """Refuse channels without a range: no scale of theirs can be taken back by the next layer."""
    still = (channels.amax(1) <= channels.amin(1)).nonzero().flatten()
    if not len(still):
        return None
    first = int(still[0])
    # a sum with zero has no sign
    value = float(channels[first, 0]) + 0.0
    return Reject(f"channel {first} of the norm's output is always {value:g}, so it has no range")


def clipped_ranges(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ends within those of each row for which the squared error of its quantized values is least.

    The lower and the upper end move by turns, each over a grid, the other held.

    Args:
        rows: float64 ``[R, N]``, no row constant.
        bits: Of a code.

    """
    ends = (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
    width = ends[1] - ends[0]
    cuts = [torch.zeros_like(width), torch.zeros_like(width)]
    for _ in range(_ROUNDS):
        for side in (1, 0):
            least = torch.full_like(width, torch.inf)
            best = cuts[side]
            for cut in _CUTS:
                tried = [torch.full_like(width, cut) if i == side else cuts[i] for i in (0, 1)]
                error = _squared_error(rows, ends[0] + tried[0] * width, ends[1] - tried[1] * width, bits)
                best = torch.where(error < least, tried[side], best)
                least = torch.minimum(least, error)
            cuts[side] = best
    return (ends[0] + cuts[0] * width).squeeze(1), (ends[1] - cuts[1] * width).squeeze(1)


def _squared_error(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = ((rows / scale).round() + zero).clamp(0, 2**bits - 1)
    found: torch.Tensor = ((codes - zero) * scale - rows).square().sum(1, keepdim=True)
    return found


def uniform_of(values: torch.Tensor, bits: int) -> Uniform:
    """Return one quantizer for all values, its range clipped on either side and widened to hold zero."""
    rows = values.reshape(1, -1).double()
    low, high = clipped_ranges(rows, bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = float(((high - low) / (2**bits - 1)).float())
    return Uniform(bits, scale, int((-low / scale).round()))
