"""Whole models on a GPU in bfloat16: ours as AOTInductor packages, beside torch.compile and torch's nested tensors.

Ours are rewritten in float32, in which rewrites are verified, and compiled in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_clock import milliseconds
from gpu_file import Job
from torch import Tensor, nn
from torch.nn import functional

import xformopt as xo
from xformopt.lowering.triton_build import MODEL, write_package
from xformopt.lowering.triton_session import TritonSession
from xformopt.models.bert import Bert
from xformopt.models.examples import example_images, example_tokens
from xformopt.models.zoo import find_architecture
from xformopt.passes.fuse.packing import Packing
from xformopt.passes.quantize.convert_precision import ConvertPrecision
from xformopt.passes.tokens.merge_tokens import MergeTokens
from xformopt.pipeline import Pass, Pipeline
from xformopt.pipeline.recipes import load_recipe
from xformopt.program import Program

__all__ = ["VariableBert", "model_jobs", "prepared", "unequal_batch"]

# capturing, verifying and compiling a model
_MINUTES = 5.0
# of BERT: lengths are uniform with this mean, one of them whole
BATCH, LENGTH, MEAN = 16, 256, 0.6
Choose = Callable[[Mapping[str, Any]], dict[str, Any]]
System = Callable[[], Tensor]


class VariableBert(nn.Module):
    """A BERT of the zoo on tokens without padding, by torch's own attention over nested tensors of unequal lengths."""

    def __init__(self, model: Bert) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
        """Tokens of all sequences one after another, ``[N]``, to logits ``[B, classes]``."""
        model = self.model
        x = model.embedding_norm(model.tokens(input_ids) + model.positions(positions))
        for block in model.blocks:
            x = block.mixer_norm(x + self._attend(block.mixer, x, offsets))
            x = block.mlp_norm(x + block.mlp(x))
        return model.head(torch.tanh(model.pooler(x[offsets[:-1]])))

    def _attend(self, mixer: Any, x: Tensor, offsets: Tensor) -> Tensor:
        apart = (mixer.heads, x.shape[1] // mixer.heads)
        layers = (mixer.query, mixer.key, mixer.value)
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(layer(x).unflatten(1, apart), offsets).transpose(1, 2)
            for layer in layers
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        return mixer.output(attended.transpose(1, 2).values().flatten(1))


@dataclass(frozen=True)
class _Ours:
    """One way through our passes."""

    name: str
    steps: tuple[Pass, ...] = ()


def model_jobs(choose: Choose) -> Iterator[Job]:
    """Yield the models."""
    yield Job("bert-base, packed", lambda: _bert(choose), _MINUTES)
    images = {"pixel_values": example_images(3, 224, batch=64)}
    merged = _Ours("ours, 40% fewer FLOPs by merging tokens", (MergeTokens(fewer_flops=0.4),))
    for name, inputs, ways in (
        ("vit-base", images, (_Ours("ours"),)),
        ("vit-base, merged tokens", images, (_Ours("ours"), merged)),
        ("gpt2", {"input_ids": example_tokens(50257, 1024, batch=8)}, (_Ours("ours"),)),
    ):
        measure = partial(_plain, name.split(",")[0], inputs, ways, choose)
        yield Job(name, measure, _MINUTES)


def unequal_batch(vocabulary: int, batch: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    """Return ids and a mask whose lengths are uniform around ``MEAN`` of ``length``, the longest of them ``length``."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace((2 * MEAN - 1) * length, length, batch).round().long()
    mask = (torch.arange(length) < lengths[torch.randperm(batch, generator=generator)].unsqueeze(1)).long()
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def prepared(model: nn.Module, inputs: Mapping[str, Tensor], steps: tuple[Pass, ...] = ()) -> Program:
    """Capture on a part of ``inputs``, enough to verify on; run the exact recipe, ``steps``, and go to bfloat16."""
    part = {name: value[:2] if value.is_floating_point() else value[:2, :32] for name, value in inputs.items()}
    program = xo.capture(model, part)
    return Pipeline((*load_recipe("exact"), *steps, ConvertPrecision(to="bf16"))).run(program).program


def _bert(choose: Choose) -> dict[str, Any]:
    model = find_architecture("bert-base").build()
    inputs = unequal_batch(30522)
    mask = inputs["attention_mask"].bool()
    lengths = mask.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    flat = [inputs["input_ids"][mask], torch.arange(LENGTH).expand_as(mask)[mask], offsets]
    programs = {"ours, packed": prepared(model, inputs, (Packing(),)), "ours, padded": prepared(model, inputs)}
    given = {name: value.cuda() for name, value in inputs.items()}
    variable, flat = VariableBert(model.bfloat16().cuda()), [value.cuda() for value in flat]
    compiled = torch.compile(variable, dynamic=False)
    rivals: dict[str, System] = {
        "nested tensors": lambda: variable(*flat),
        "nested tensors, torch.compile": lambda: compiled(*flat),
    }
    found = _compare(model, given, programs, rivals, choose)
    return {"batch": BATCH, "length": LENGTH, "tokens_kept": float(mask.float().mean()), **found}


def _plain(name: str, inputs: Mapping[str, Tensor], ways: tuple[_Ours, ...], choose: Choose) -> dict[str, Any]:
    model = find_architecture(name).build()
    programs = {way.name: prepared(model, inputs, way.steps) for way in ways}
    given = {key: value.cuda() for key, value in inputs.items()}
    found = _compare(model.bfloat16().cuda(), given, programs, {}, choose)
    return {"shape": {key: list(value.shape) for key, value in inputs.items()}, **found}


@torch.no_grad()
def _compare(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    programs: Mapping[str, Program],
    rivals: Mapping[str, System],
    choose: Choose,
) -> dict[str, Any]:
    """Time every system by device events, and from a graph where it can be recorded."""
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    expected = _exact(model, inputs)
    compiled = torch.compile(model, dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        systems: dict[str, System] = {}
        for number, (name, program) in enumerate(programs.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            at = {key: value.cpu() for key, value in inputs.items()}
            write_package(program, at, place, lambda trials: (choose(trials), ()))
            session = TritonSession(place / MODEL)
            tensors = [inputs[key] for key in session.input_names]
            systems[name] = lambda s=session, t=tensors: s.call(t)[0]  # type: ignore[misc]
        systems["torch.compile"] = lambda: next(iter(compiled(**halves).values()))
        systems["eager"] = lambda: next(iter(model(**halves).values()))
        return {"systems": {name: _timed(call, expected) for name, call in {**systems, **rivals}.items()}}


def _exact(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the model computes in float32, whose weights are those in bfloat16."""
    result: Tensor = next(iter(model.float()(**inputs).values()))
    model.bfloat16()
    return result


def _timed(call: System, expected: Tensor) -> dict[str, Any]:
    try:
        found = call().double()
        gap = float((found - expected.double()).norm() / expected.double().norm())
        taken, _ = milliseconds(call, may_record=False)
        recorded, is_graph = milliseconds(call)
    # a rival that does not run is said to
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    return {"milliseconds": taken, "from_graph_milliseconds": recorded if is_graph else None, "relative_l2": gap}
