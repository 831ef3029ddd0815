"""What the passes that linearize attention share: where it pays, what is fitted, and what is accepted.

1. An attention whose mask the linear form cannot express stays, and so does one whose sequences are not longer than
   the crossover of both forms on the target (:mod:`xformopt.passes.linearize.support.crossover`).
2. What the method fits is trained layer by layer: every linear form reads what its attention reads in the original
   program, and learns to give what that attention gives,

       min  mean((form_l(x_l) - attention_l(x_l))^2)        over valid positions of the calibration data

   with everything else as it is (the attention transfer of LoLCATs, Zhang et al., arXiv 2410.10254, section 3.2).
3. Where the squared error is more than ``max_error`` of the squared attention, the layer stays.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.errors import DataError, PassError
from xformopt.match import is_call, xf
from xformopt.passes.linearize.support.crossover import Crossover, lone_site
from xformopt.passes.linearize.support.sites import Site, is_too_short, read_site
from xformopt.passes.samples import sample_rows
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Output, Program, example_sizes, interpret, path_of, valid_positions, value_of
from xformopt.reconstruction import Attempt, Free, Settings, cut_at, reconstruct
from xformopt.rewrite import Editor, Reject, rewrite

__all__ = ["FittedLinearization", "Form", "Linearization", "Pairs", "Trained"]

# fitted parameters by name
Trained = dict[str, torch.Tensor]

_SWIFT = 10.0


@dataclass(frozen=True)
class Form:
    """A linear form in a program.

    Attributes:
        node: Its result.
        parameters: Those that can be fitted, by name.
        swift: Of these, numbers that may have to go far.
        watched: A value that the method wants samples of.

    """

    node: fx.Node
    parameters: tuple[str, ...] = ()
    swift: tuple[str, ...] = ()
    watched: fx.Node | None = None


@dataclass(frozen=True)
class Linearization(Pass):
    """A pass that puts a linear form in the place of softmax attention.

    Attributes:
        layers: Shell patterns of module paths of the attentions; empty: all.
        force: Whether to linearize below the crossover, too.
        max_error: Largest squared error of a layer on calibration data, over that of zeros, at which it is accepted.

    """

    layers: tuple[str, ...] = ()
    force: bool = False
    max_error: float = 1.0

    def __post_init__(self) -> None:
        if not self.max_error > 0:
            raise ValueError(f"max_error must be positive, but is {self.max_error}")

    @abstractmethod
    def build(self, editor: Editor, site: Site, trained: Trained) -> Form:
        """Insert the linear form of ``site``; parameters take the values in ``trained``, by name."""

    def untrained(self, site: Site) -> Trained:
        """Return what ``build`` needs to be given, at any values of the right sizes, to make the form that is timed."""
        return {}

    def train(self, pairs: Pairs) -> tuple[Trained, list[str]]:
        """Return the fitted parameters of all forms by name, and notes: none, unless a method fits."""
        return {}, []

    @abstractmethod
    def refusal(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        """Return why this method cannot linearize a site whose sequences have ``length`` tokens, or None."""

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose the layers, fit their linear forms, and keep those that are close enough."""
        attentions = [node for node in program.nodes() if is_call(node, xf.attention)]
        if not attentions:
            raise PassError(
                f"The program {program.name!r} has no attention to linearize. Looked for xf.attention; its operators "
                f"are others, or were fused by a pass that belongs after this one."
            )
        crossover = Crossover(context, self._alone)
        reasons, sites = self._choose(program, context, attentions, crossover)
        notes = list(crossover.describe())
        trained: Trained = {}
        if sites:
            trained, told = self.train(Pairs(self, program, context, sites))
            errors = Pairs(self, program, context, sites, trained).errors()
            for name, error in errors.items():
                if error > self.max_error:
                    reasons[name] = (
                        f"the error of its linear form is {error:.2f} of the attention's own size, more than "
                        f"max_error={self.max_error:g}"
                    )
            notes += [*told, *(f"{path_of(s.node) or s.node.name}: error {errors[s.node.name]:.3f}" for s in sites)]

        def linearize(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.attention):
                return None
            if (reason := reasons.get(node.name)) is not None:
                return Reject(reason)
            return self.build(editor, _site(editor.program, node), trained).node

        done = rewrite(program, {self.name: linearize})
        if not done.fired:
            return PassResult(program, False, (), done.rejected, tuple(notes))
        return PassResult(done.program, True, done.fired, done.rejected, tuple(notes))

    def _alone(self, program: Program) -> Program:
        """Return the linear form of a program that is one attention."""
        result = program.copy()
        site = lone_site(result)
        editor = Editor(result).at(site.node)
        site.node.replace_all_uses_with(self.build(editor, site, self.untrained(site)).node)
        return result.drop_unused()

    def _choose(
        self, program: Program, context: Context, attentions: Sequence[fx.Node], crossover: Crossover
    ) -> tuple[dict[str, str], list[Site]]:
        """Return why attentions stay, by name, and the sites of the others."""
        lengths = [program.bind(batch) for batch in context.calibration] or [example_sizes(program)]
        reasons: dict[str, str] = {}
        sites = []
        for done, node in enumerate(attentions):
            context.progress("looking for the crossover", done, len(attentions))
            found = read_site(program, node)
            if isinstance(found, Reject):
                reasons[node.name] = found.reason
                continue
            tokens = [found.length(program, sizes) for sizes in lengths]
            # what a form can do at all, the longest input decides; what pays, the usual one
            reason = self._reason(found, max(tokens), program, context)
            if reason is None and not self.force:
                reason = crossover.refusal(found, statistics.median_low(tokens))
            if reason is None:
                sites.append(found)
            else:
                reasons[node.name] = reason
        return reasons, sites

    def _reason(self, site: Site, length: int, program: Program, context: Context) -> str | None:
        if self.layers and not any(fnmatchcase(path_of(site.node), pattern) for pattern in self.layers):
            return "it is not among the chosen layers"
        return is_too_short(site, length) or self.refusal(site, length, program, context)


@dataclass(frozen=True)
class FittedLinearization(Linearization):
    """A linearization whose forms have parameters that are trained to give what attention gives.

    Attributes:
        iterations: Training steps of each layer, at most.
        minutes: What all training may take; None: no limit.
        rate: Learning rate of the fit.

    """

    iterations: int = 200
    minutes: float | None = 5.0
    rate: float = 1e-2

    effect: ClassVar[Effect] = "tuned"
    before_fusion: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, but is {self.rate}")
        self._settings(0)

    def train(self, pairs: Pairs) -> tuple[Trained, list[str]]:
        """Fit all forms."""
        return pairs.fit(self._settings(pairs.context.seed), self.rate)

    def _settings(self, seed: int) -> Settings:
        return Settings(iterations=self.iterations, minutes=self.minutes, seed=seed)


@dataclass
class Pairs:
    """The linear forms beside the attentions they are to replace, in one program.

    Attributes:
        method: Whose forms.
        program: What is linearized.
        context: Has the calibration data.
        sites: The attentions.
        trained: Parameters that were fitted already.

    """

    method: Linearization
    program: Program
    context: Context
    sites: Sequence[Site]
    trained: Trained = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.context.calibration:
            raise DataError(
                "Linear forms are fitted and judged on calibration data, and there is none. Give some with "
                "--calibration (or calibration=... in Python)."
            )
        self.paired = self.program.copy()
        self.pairs: dict[str, str] = {}  # from the name of a form to that of its attention
        self.parameters: dict[str, float] = {}  # from those to fit to their pace, as a multiple of the learning rate
        self.watched: dict[str, str] = {}  # from the name of an attention to that of a value of its form
        self.cuts: list[tuple[str, list[str]]] = []
        named = {node.name: node for node in self.paired.graph.nodes}
        for site in self.sites:
            self._add(named[site.node.name])
        results = tuple(node for node in self.paired.graph.nodes if node.name in self.pairs)
        self.paired.output_node.args = ((*self.paired.results, *results),)
        self.paired.outputs = (*self.program.outputs, *(Output(node.name) for node in results))

    def _add(self, node: fx.Node) -> None:
        editor = Editor(self.paired).at(node)
        form = self.method.build(editor, _site(self.paired, node), self.trained)
        created = set(editor.created)
        read = {value for new in (*created, node) for value in new.all_input_nodes if value not in created}
        path = path_of(node) or node.name
        self.cuts.append((f"before {path}", [value.name for value in read if value.op == "call_function"]))
        self.cuts.append((path, [form.node.name, node.name]))
        self.pairs[form.node.name] = node.name
        self.parameters |= {name: _SWIFT if name in form.swift else 1.0 for name in form.parameters}
        if form.watched is not None:
            self.watched[node.name] = form.watched.name

    def fit(self, settings: Settings, rate: float) -> tuple[Trained, list[str]]:
        """Train the parameters of all forms; return all that are known by name, and a note."""
        if not self.parameters:
            return self.trained, []
        start, method = self.paired.parameters, self.method
        found = reconstruct(
            self.paired,
            self.paired,
            self.context.calibration,
            {name: partial(Free, start[name], rate=rate * pace) for name, pace in self.parameters.items()},
            settings,
            describes=(method.name, asdict(method), self.parameters),
            blocks=cut_at(self.paired, self.cuts),
            objective=partial(_distance, self.pairs),
            progress=self.context.progress,
        )
        steps = max(block.iterations for block in found.blocks)
        return {**self.trained, **found.results}, [f"{len(found.blocks)} layers fitted in up to {steps} steps"]

    def samples(self, rows: int) -> Trained:
        """Return rows ``[N, C]`` of the values that are watched, by the attention's name."""
        found = sample_rows(self.paired, self.context.calibration, self.watched.values(), rows=rows)
        return {attention: found[value] for attention, value in self.watched.items()}

    def errors(self) -> dict[str, float]:
        """Return the squared error of each form over its attention's squares, by the attention's name."""
        sums = {name: [0.0, 0.0] for name in self.pairs.values()}
        for batch in self.context.calibration:
            values: dict[str, torch.Tensor] = {}
            wanted = {*self.pairs, *self.pairs.values()}

            def observe(
                node: fx.Node, value: Any, kept: dict[str, torch.Tensor] = values, names: set[str] = wanted
            ) -> None:
                if node.name in names:
                    kept[node.name] = value

            interpret(self.paired, batch, observe=observe)
            for form, attention in self.pairs.items():
                error, size = _squares(self.paired, batch, attention, values[attention], values[form])
                sums[attention][0] += error
                sums[attention][1] += size
        return {name: error / size if size else 0.0 for name, (error, size) in sums.items()}


def _site(program: Program, node: fx.Node) -> Site:
    found = read_site(program, node)
    assert not isinstance(found, Reject), "sites are those of attentions that were read before"
    return found


def _squares(
    program: Program, batch: Mapping[str, torch.Tensor], name: str, wanted: torch.Tensor, found: torch.Tensor
) -> tuple[float, float]:
    """Return the sums of squares of the error and of what is wanted, on valid positions."""
    node = next(node for node in program.graph.nodes if node.name == name)
    valid = valid_positions(program, value_of(node), batch)
    counts = torch.ones_like(wanted, dtype=torch.bool) if valid is None else valid.expand_as(wanted)
    difference = (found - wanted)[counts]
    if not bool(difference.isfinite().all()):
        raise DataError(
            f"On the calibration data, {path_of(node) or name} or its linear form computes values that are NaN or "
            f"infinite. Look for the cause in the data or the model."
        )
    return float(difference.double().square().sum()), float(wanted[counts].double().square().sum())


def _distance(pairs: Mapping[str, str], attempt: Attempt) -> torch.Tensor:
    """The mean squared distance of the block's linear form to its attention."""
    found = attempt.run(None)
    form = next(name for name in pairs if name in found)
    squared = (found[form] - attempt.wanted[pairs[form]]).square()
    valid = attempt.valid.get(pairs[form])
    return squared.mean() if valid is None else squared[valid.expand_as(squared)].mean()
