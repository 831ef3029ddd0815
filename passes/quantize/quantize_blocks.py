"""Quantize everything in blocks: weights, embeddings, biases, and the results of every layer (BCT).

    parameters:     w^ = 2^e clip(round(w / 2^e), -2^(b-1), 2^(b-1) - 1),   one e for each block of neighbours
    results:        the same in 8 bits, one fixed e for each block of channels, found on calibration data

A block's exponent is the one of least squared error among those that clip nothing and those two below.  Results are
those of linear layers, embeddings, norms, activations and attention; softmax has the scale 2^-7.  What a program
returns stays in float.

The notes tell the ratio of bytes reached, beside the 7.988 of the paper, which is what 4 bits give with about 0.006
bits of scales for each value.

**Approximate**, without retraining; needs calibration data.  Run it after the passes that look for linear layers.
Parameters are stored in few bits and computed in float, unpacked when the program is loaded; the quantization of
results is **simulated**.  That blocks are runs of neighbours and scales powers of two is our reading of the paper.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.errors import DataError, PassError
from xformopt.kernels.packing import pack
from xformopt.match import arguments, is_call, is_returned, xf
from xformopt.observers import Range, observe_ranges
from xformopt.passes.fold.eliminate_common_subexpressions import EliminateCommonSubexpressions
from xformopt.passes.quantize.support.quantized_layers import refuse_repetition
from xformopt.passes.weights import is_skipped
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program, value_of
from xformopt.rewrite import Editor, Reject, rewrite

__all__ = ["QuantizeBlocks", "block_codes"]

aten = torch.ops.aten
_ROUNDED = (
    xf.linear,
    xf.linear_activation,
    xf.activation,
    xf.glu,
    xf.layer_norm,
    xf.rms_norm,
    xf.attention,
    xf.patch_embedding,
    aten.embedding.default,
)
_SUM_NORMS = (xf.add_layer_norm, xf.add_rms_norm)
# bits of results, and the exponent of softmax, whose values reach 1
_RESULT_BITS, _SOFTMAX = 8, -7
_PAPER = 7.988


@dataclass(frozen=True)
class QuantizeBlocks(Pass):
    """Quantize parameters and results in blocks with powers of two for scales.

    Attributes:
        bits: Of codes of matrices: weights and embeddings, 4 or 8.
        vector_bits: Of codes of vectors: biases and weights of norms, 4 or 8.
        block: Neighbouring values of a parameter that share a scale.
        channels: Neighbouring channels of a result that share a scale, where they divide its channels.
        results: Whether results are rounded, too.
        skip: Shell patterns of module paths or parameter names that stay in floating point.

    """

    bits: int = 4
    vector_bits: int = 8
    block: int = 1280
    channels: int = 64
    results: bool = True
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = ("Dong et al., Blockwise Compression of Transformers, arXiv 2304.01483",)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.vector_bits not in (4, 8):
            raise ValueError("bits and vector_bits must be 4 or 8")
        if self.block < 1 or self.channels < 1:
            raise ValueError("block and channels must be at least 1")

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the ranges of results, then store parameters in blocks and round results."""
        refuse_repetition(program, {"block_parameter"}, "parameters")
        _check_parameters(program)
        scales = self._scales(program, context) if self.results else {}
        codes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def quantize_blocks(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            stored = [source for source in node.all_input_nodes if _is_parameter(source)]
            if not stored and node.name not in scales:
                return None
            if is_skipped(node, self.skip):
                return Reject("it is named in skip")
            new = {source: self._stored(editor, source, codes) for source in stored}
            if is_call(node, xf.attention) and node.name in scales:
                result = _attention(editor, node)
            else:
                args = fx.map_arg(node.args, lambda old: new.get(old, old))
                keywords: dict[str, Any] = dict(fx.map_arg(dict(node.kwargs), lambda old: new.get(old, old)))
                result = editor.call(node.target, *args, **keywords)
            if (scale := scales.get(node.name)) is None:
                return result
            return editor.call(
                xf.fake_quantize, result, editor.parameter(f"{node.name}.scale", scale), bits=_RESULT_BITS
            )

        done = rewrite(program, {"quantize-blocks": quantize_blocks}, sweeps=1)
        if not done.fired:
            return PassResult(program, False, (), done.rejected)
        # several readers of one parameter have unpacked it each until here
        result = EliminateCommonSubexpressions().run(done.program, context).program
        result.level = Level.TARGET
        note = self._ratio(program, result, codes)
        return PassResult(result, True, done.fired, done.rejected, (note,))

    def _stored(self, editor: Editor, source: fx.Node, codes: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> fx.Node:
        name = str(source.target)
        value = editor.program.parameters[name]
        bits = self.bits if value.dim() > 1 else self.vector_bits
        if name not in codes:
            codes[name] = block_codes(value, bits=bits, block=self.block)
        stored = (
            editor.parameter(f"{name}.codes", codes[name][0]),
            editor.parameter(f"{name}.exponents", codes[name][1]),
        )
        return editor.call(xf.block_parameter, *stored, bits=bits, block=self.block, shape=list(value.shape))

    def _scales(self, program: Program, context: Context) -> dict[str, torch.Tensor]:
        """Return the scale of every result: one number for each channel, or a scalar where blocks do not divide."""
        if not context.calibration:
            raise DataError(
                "Results are quantized in ranges found on calibration data, and there is none. Give some with "
                "--calibration (or calibration=... in Python), or leave them in float with results=false."
            )
        wanted = [node for node in program.nodes() if _is_rounded(node)]
        divided = [node.name for node in wanted if _width(node) % self.channels == 0]
        others = [node.name for node in wanted if _width(node) % self.channels]
        scales: dict[str, torch.Tensor] = {}
        for names, kind in ((divided, "group"), (others, "tensor")):
            found = observe_ranges(
                program,
                context.calibration,
                names,
                granularity="group" if kind == "group" else "tensor",
                group=self.channels,
                progress=context.progress,
            )
            for name, ends in found.items():
                scale = _power_scale(ends)
                scales[name] = scale.repeat_interleave(self.channels) if kind == "group" else scale[0].clone()
        return scales

    def _ratio(self, program: Program, result: Program, codes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
        """Compare the bytes of what was stored in blocks, and of all parameters."""
        before = sum(program.parameters[name].nbytes for name in codes)
        after = sum(packed.nbytes + exponents.nbytes for packed, exponents in codes.values())
        return (
            f"{len(codes)} parameters in blocks: {before} bytes became {after}, a ratio of {before / after:.3f} "
            f"(published: {_PAPER}); all parameters, with the scales of results: "
            f"{program.parameter_bytes / result.parameter_bytes:.3f}"
        )


def block_codes(value: torch.Tensor, *, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed codes and the exponents (int8) of ``xf.block_parameter``."""
    flat = value.detach().double().flatten()
    middle = 2 ** (bits - 1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = padded.abs().amax(1, keepdim=True)
    top = torch.where(largest > 0, largest, 1.0).div(middle - 1).log2().ceil()
    candidates = [(top - below).clamp(-126, 127) for below in range(3)]
    steps = [(padded / torch.exp2(e)).round().clamp(-middle, middle - 1) for e in candidates]
    losses = torch.stack([(s * torch.exp2(e) - padded).square().sum(1) for s, e in zip(steps, candidates, strict=True)])
    best = losses.argmin(0)
    rows = torch.arange(len(padded))
    chosen = torch.stack(steps)[best, rows] + middle
    exponents = torch.stack(candidates)[best, rows].flatten()
    return pack(chosen.flatten()[: len(flat)].to(torch.uint8), bits), exponents.to(torch.int8)


def _power_scale(ends: Range) -> torch.Tensor:
    """Return the smallest powers of two that clip nothing, float32."""
    largest = torch.maximum(ends.low.abs(), ends.high.abs())
    limit = 2 ** (_RESULT_BITS - 1) - 1
    return torch.exp2(torch.where(largest > 0, largest, 1.0).div(limit).log2().ceil()).float()


def _attention(editor: Editor, node: fx.Node) -> fx.Node:
    """Compute attention with rounded weights between its two products."""
    given = arguments(node)
    v = given.pop("v")
    heads = {name: given[name] for name in ("heads", "kv_heads")}
    operands = [given.pop(name) for name in ("q", "k", "key_mask", "bias", "key_log_size")]
    weights = editor.call(xf.attention_weights, *operands, **given)
    scale = editor.parameter("softmax.scale", torch.tensor(2.0**_SOFTMAX))
    rounded = editor.call(xf.fake_quantize, weights, scale, bits=_RESULT_BITS)
    return editor.call(xf.attention_values, rounded, v, **heads)


def _is_rounded(node: fx.Node) -> bool:
    if is_returned(node):
        return False
    if node.target is operator.getitem:
        return bool(node.args[1] == 0) and is_call(node.args[0], *_SUM_NORMS)
    return is_call(node, *_ROUNDED) and value_of(node).dtype == torch.float32


def _is_parameter(node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value = value_of(node)
    return value.dtype == torch.float32 and value.dim() > 0 and value.numel() > 1


def _width(node: fx.Node) -> int:
    return int(value_of(node).shape[-1])


def _check_parameters(program: Program) -> None:
    for name, value in program.parameters.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise PassError(
                f"The parameter {name} holds NaN or infinite values, which no code stands for. Restore the checkpoint."
            )
