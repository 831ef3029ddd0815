"""Replace linear layers by tables of rows that the signs of their input choose (MemoryFormer's Memory Layer).

    y = W x + b    ->    y = sum_k p(z_k) T_k[h(z_k)] + b'

z_k are parts of x of a few channels, h(z) the place their signs name, p(z) how sure they are (``xf.memory_linear``).

MemoryFormer trains its tables from nothing, in a model that has no other linear layers.  For a model that is there they
are fitted, layer by layer, each behind those before it:

    T, b' = argmin  sum_n |sum_k p(z_nk) T_k[h(z_nk)] + b' - (W x_n + b)|^2  +  r |T - T0|^2

over rows n of calibration data, x as the original model has it and z as it is by now.  T0 is what the weight itself
says of a row, ``W_k (s * mean |z_k|) / mean p``, and stands where no data reach.  Of a few temperatures t, the one is
taken whose tables err least on rows held out.

**Approximate**, and by far: signs keep about two thirds of a normal variable's variance.  Follow it with
``recover-accuracy``, and see what the model is still worth.  A layer's products fall to one for each part and output;
its tables are ``2^bits / bits`` times as large as the weight.

Ding et al., MemoryFormer, NeurIPS 2024, arXiv 2411.12992.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional

from xformopt.errors import DataError, PassError
from xformopt.kernels.memory_linear import memory_linear
from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.factorize.support.hashed_tables import Tables, fit_tables
from xformopt.passes.samples import valid_rows
from xformopt.passes.weights import check_weights, is_skipped, linear_layers, linear_parts
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program, path_of, value_of
from xformopt.program.interpret import evaluate
from xformopt.rewrite import Editor, Reject, rewrite

__all__ = ["TabulateLinears"]

# rows of tables that one solution finds
_MOST_UNKNOWN = 4096
_FEWEST_ROWS = 8


@dataclass(frozen=True)
class TabulateLinears(Pass):
    """Replace linear layers by hashed tables, fitted on calibration data.

    Attributes:
        layers: Shell patterns of module paths or weight names; empty: all.
        skip: Shell patterns of those that stay.
        bits: Channels of a part: its table has 2^bits rows.
        rows: Rows of calibration data that tables are fitted on.
        ridge: How much the tables that follow from the weights are held on to.
        max_error: Largest squared error of a layer, over that of zeros, at which it is replaced.

    """

    layers: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    bits: int = 4
    rows: int = 4096
    ridge: float = 1e-2
    max_error: float = 1.0

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = ("Ding et al., MemoryFormer, NeurIPS 2024, arXiv 2411.12992",)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must lie in [1, 8], but is {self.bits}")
        if self.rows < _FEWEST_ROWS:
            raise ValueError(f"rows must be at least {_FEWEST_ROWS}, but is {self.rows}")
        for name in ("ridge", "max_error"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Fit the tables of each layer behind those before it, and put those in that are close enough."""
        every = linear_layers(program)
        if not every:
            raise PassError(
                f"The program {program.name!r} has no linear layers to make tables of. Looked for xf.linear and "
                f"xf.linear_activation; run this before passes that quantize or factorize them."
            )
        if not context.calibration:
            raise DataError(
                "Tables are fitted on calibration data, and there is none. Give some with --calibration (or "
                "calibration=... in Python)."
            )
        chosen = [node for node in every if self._refusal(node) is None]
        check_weights(program, chosen)
        tried = self._fit(program, context, chosen)
        fitted = {name: found for name, found in tried.items() if found.error <= self.max_error}
        result = self._replaced(program, fitted, tried)
        notes = tuple(
            f"{path_of(node) or node.name}: error {fitted[node.name].error:.3f}, t {fitted[node.name].temperature:.3g}"
            for node in chosen
            if node.name in fitted
        )
        return PassResult(result.program, result.changed, result.fired, result.rejected, notes)

    def _refusal(self, node: fx.Node) -> str | None:
        """Return why a layer is left alone, whatever its tables would be, or None."""
        name, inputs = str(operand(node, 1).target), int(value_of(operand(node)).shape[-1])
        if self.layers and not any(fnmatchcase(each, p) for each in (path_of(node), name) for p in self.layers):
            return "it is not among the chosen layers"
        if is_skipped(node, self.skip):
            return "it is named in skip"
        if (readers := len(operand(node, 1).users)) > 1:
            return f"its weight has {readers} readers and would be stored twice"
        if any(parameter.op != "get_attr" for parameter in node.all_input_nodes[1:]):
            return "one of its parameters is computed"
        if inputs % self.bits:
            return f"its {inputs} inputs are no whole parts of {self.bits}"
        if (unknown := inputs // self.bits * 2**self.bits) > _MOST_UNKNOWN:
            return f"its tables have {unknown} rows, more than the {_MOST_UNKNOWN} that are fitted at once"
        return None

    def _replaced(self, program: Program, fitted: Mapping[str, Tables], every: Mapping[str, Tables]) -> PassResult:
        def tabulate_linear(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.linear, xf.linear_activation):
                return None
            parts = linear_parts(editor, node)
            if isinstance(parts, Reject):
                return parts
            if (reason := self._refusal(node)) is not None:
                return Reject(reason)
            if node.name not in fitted:
                error = every[node.name].error
                return Reject(f"its tables err by {error:.2f} of it, more than max_error={self.max_error:g}")
            found, stem = fitted[node.name], parts.weight_name.removesuffix("weight").rstrip("._") or parts.weight_name
            dtype = parts.weight.dtype
            stored = (("tables", found.tables), ("tables.bias", found.bias))
            operands = (editor.parameter(f"{stem}.{what}", value.to(dtype)) for what, value in stored)
            tabulated = editor.call(xf.memory_linear, operand(node), *operands, temperature=found.temperature)
            tabulated.meta["path"] = path_of(node)
            if is_call(node, xf.linear):
                return tabulated
            return editor.call(xf.activation, tabulated, function=arguments(node)["function"])

        done = rewrite(program, {self.name: tabulate_linear}, sweeps=1)
        if not done.fired:
            return PassResult(program, False, (), done.rejected)
        done.program.level = Level.TARGET
        return PassResult(done.program, True, done.fired, done.rejected)

    def _fit(self, program: Program, context: Context, chosen: Sequence[fx.Node]) -> dict[str, Tables]:
        """Run the program as it was and as it becomes side by side, and fit each layer as it is reached."""
        batches = [program.completed(batch) for batch in context.calibration]
        runs = [_Run(program, batch) for batch in batches]
        found: dict[str, Tables] = {}
        wanted = set(chosen)
        with torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "output":
                    break
                tables = None
                if node in wanted:
                    context.progress("fitting tables", len(found), len(wanted))
                    tables = found[node.name] = self._fit_one(program, node, runs, context.seed)
                for run in runs:
                    run.step(node, tables if tables is not None and tables.error <= self.max_error else None)
        return found

    def _fit_one(self, program: Program, node: fx.Node, runs: Sequence[_Run], seed: int) -> Tables:
        given, source = arguments(node), operand(node)
        share = max(1, self.rows // len(runs))
        before = torch.cat([run.rows(source, run.original, share) for run in runs])
        now = torch.cat([run.rows(source, run.current, share) for run in runs])
        weight = program.parameters[str(given["weight"].target)]
        bias = None if given["bias"] is None else program.parameters[str(given["bias"].target)]
        wanted = functional.linear(before, weight, bias)
        return fit_tables(now, wanted, weight, bias, bits=self.bits, ridge=self.ridge, seed=seed)


class _Run:
    """One batch's values so far, in the program as it was and as it becomes; freed behind their last reader."""

    def __init__(self, program: Program, batch: Mapping[str, torch.Tensor]) -> None:
        self.program, self.batch = program, batch
        self.original: dict[fx.Node, Any] = {}
        self.current: dict[fx.Node, Any] = {}
        self._waiting = {node: len(node.users) for node in program.graph.nodes}

    def step(self, node: fx.Node, tables: Tables | None) -> None:
        """Compute a node in both, the second time by tables where there are some."""
        self.original[node] = evaluate(self.program, node, self.batch, self.original)
        if tables is None:
            self.current[node] = evaluate(self.program, node, self.batch, self.current)
        else:
            x = self.current[operand(node)]
            parts = (tables.tables.to(x.dtype), tables.bias.to(x.dtype))
            answer = memory_linear(x, *parts, temperature=tables.temperature)
            function = arguments(node).get("function")
            self.current[node] = answer if function is None else xf.activation(answer, function=function)
        for argument in {*node.all_input_nodes}:
            self._waiting[argument] -= 1
            if not self._waiting[argument]:
                del self.original[argument], self.current[argument]

    def rows(self, node: fx.Node, values: Mapping[fx.Node, Any], share: int) -> torch.Tensor:
        """Return so many rows of a value, spread evenly over those that are no padding."""
        found = valid_rows(self.program, self.batch, node, values[node])
        return found[torch.linspace(0, len(found) - 1, min(share, len(found))).round().long()]
