"""Attend to few mixtures of keys and values instead of all of them (Linformer).

    softmax(s q K^T) V    ->    softmax(s q (E K)^T) (F V),    E, F [k, T]

E and F begin as averages of neighbouring positions and are trained block by block, each block against the original's
output on calibration data (:mod:`xformopt.reconstruction`); the heads of a layer share them.  They have one column for
each position: a sequence whose length varies is refused, and so are causal attention and masks, which a mixture of
positions cannot obey.

**Tuned**: takes gradient steps on calibration data, and is another architecture, published with training of the whole
model: expect to train on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, call_with, is_call, xf
from xformopt.passes.budgets import used
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, path_of, shape_of
from xformopt.reconstruction import Free, Settings, reconstruct
from xformopt.rewrite import Editor, Reject, rewrite

__all__ = ["ProjectKeys"]

_RATE = 3e-3


@dataclass(frozen=True)
class ProjectKeys(Pass):
    """Replace the keys and values of attention by fewer mixtures of them, which are trained.

    Attributes:
        keys: How many mixtures of keys and values there are: k.
        iterations: Training steps of each block, at most; 0: averages of neighbours stay.
        minutes: What training may take in all; steps are reduced to what fits.  None: no limit.

    """

    keys: int = 128
    iterations: int = 400
    minutes: float | None = 10.0

    effect: ClassVar[Effect] = "tuned"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Wang et al., Linformer, arXiv 2006.04768, section 4",)

    def __post_init__(self) -> None:
        if self.keys < 1:
            raise ValueError(f"keys must be at least 1, but is {self.keys}")
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, but is {self.iterations}")
        Settings(minutes=self.minutes)

    def run(self, program: Program, context: Context) -> PassResult:
        """Put the averages in, and train them."""
        if not any(is_call(node, xf.attention) for node in program.nodes()):
            raise PassError(
                f"The program {program.name!r} has nothing that {self.name} could change. Looked for: xf.attention. "
                f"Found: {sum(1 for _ in program.nodes())} other operators."
            )
        done = rewrite(program, {"project-keys": self._project_keys}, sweeps=1)
        if not done.fired:
            return PassResult(program, False, (), done.rejected)
        changed = done.program
        notes = [f"{len(done.fired)} attentions to {self.keys} keys each"]
        if self.iterations:
            made = [name for name in changed.parameters if name not in program.parameters]
            found = reconstruct(
                program,
                changed,
                context.calibration,
                {name: partial(Free, changed.parameters[name], rate=_RATE) for name in made},
                Settings(iterations=self.iterations, minutes=self.minutes, seed=context.seed),
                describes=(self.name, asdict(self)),
                progress=context.progress,
            )
            changed.parameters = {**changed.parameters, **found.results}
            notes.append(found.summary())
        notes.append(f"flops: {1 - used(changed, 'flops') / used(program, 'flops'):.1%} removed")
        return PassResult(changed, True, done.fired, done.rejected, tuple(notes))

    def _project_keys(self, editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        if not is_call(node, xf.attention):
            return None
        given = arguments(node)
        length = shape_of(editor.program, given["k"])[1]
        if (reason := self._refusal(given, length)) is not None:
            return Reject(reason)
        average = averages(self.keys, int(str(length)))
        mixed = {
            name: editor.call(
                torch.ops.aten.matmul.default,
                editor.parameter(f"{path_of(node) or node.name}.{label}", average.clone()),
                given[name],
            )
            for name, label in (("k", "key_projection"), ("v", "value_projection"))
        }
        return call_with(editor, node, **mixed)

    def _refusal(self, given: Mapping[str, Any], length: object) -> str | None:
        if given["causal"]:
            return "it is causal: a mixture of keys would show a query what comes after it"
        if given["window_left"] >= 0 or given["window_right"] >= 0:
            return "each query sees a window of its own, which mixtures of all keys do not have"
        if any(given[name] is not None for name in ("key_mask", "bias", "key_log_size")):
            return "keys are masked or weighted one by one, which mixtures of them cannot be"
        if not isinstance(length, int):
            return f"the number of its keys, {length}, varies: a projection has one column for each"
        if length <= self.keys:
            return f"it has only {length} keys"
        return None


def averages(keys: int, length: int) -> torch.Tensor:
    """Return ``[k, T]``, whose rows average neighbouring positions, as equally many each as can be."""
    owner = torch.arange(length) * keys // length
    member = (owner == torch.arange(keys).unsqueeze(1)).float()
    return member / member.sum(1, keepdim=True)
