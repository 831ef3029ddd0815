"""Write the weights of linear layers as products of a sparse matrix and a small dense one (DSFormer).

    y = W x + b    ->    y = C (D x) + b,    C [O, M] with exactly K entries in each row, D [M, I]

D, the entries of C and their places are stored, in ``keep`` of the weight's bytes.  M is the one of several whose fit
loses least, and a layer is replaced only where that is less than what a product of two dense matrices, by SVD, loses
at as many bytes.

With ``iterations``, the straight-through factorizer: the full weight W is kept and trained; each forward pass
factorizes it anew and computes with C D, the backward pass takes the factorization for the identity.  What is minimized
is the divergence of the program's answers from the original's on calibration data (the paper has the labels of a task).
That a layer's weight is one block is our reading of the paper.

**Tuned** with ``iterations``; needs calibration data.  Run it after the passes that look for linear layers.  Entries
are **stored** sparse; the target computes two **dense** products, so that bytes are saved, and time only where M is
small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.answers import Answer
from xformopt.passes.factorize.support.layers import Candidates, Shared, find_candidates, seen_inputs
from xformopt.passes.factorize.support.low_rank import break_even, decompose, whitening
from xformopt.passes.factorize.support.sparse_factors import SparseFactors, entries_within, fit_factors
from xformopt.passes.weights import bias_operand, linear_parts
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program, value_of
from xformopt.reconstruction import Attempt, Free, Objective, Settings, cut_at, reconstruct
from xformopt.rewrite import Editor, Reject, Rewritten, rewrite

__all__ = ["FactorizeSparse"]

# numbers of dense vectors that are tried, and how often factors are fitted to tell them apart, and in the end
_VECTORS = (16, 32, 64, 128, 256)
_TRIED, _FITTED = 1, 4


@dataclass(frozen=True)
class FactorizeSparse(Pass):
    """Store the weights of linear layers as sparse times dense matrices.

    Attributes:
        keep: The share of a weight's bytes that its factors take, places of entries included.
        whiten: Weigh errors by what each layer reads on calibration data, instead of by the weight alone.
        iterations: Training steps of the straight-through factorizer; 0: factors are fitted once.
        skip: Shell patterns of module paths or weight names that stay dense.

    """

    keep: float = 0.5
    whiten: bool = True
    iterations: int = 0
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "tuned"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = (
        "Chand et al., DSFormer, arXiv 2312.13211",
        "Wang et al., Generalized Orthogonal Matching Pursuit, arXiv 1111.6664",
    )

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, but is {self.keep}")
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, but is {self.iterations}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Fit the factors of every layer, train them where asked to, and replace the layers."""
        found = find_candidates(program, self.name, self.skip)
        fits = self._fitted(program, found, context)
        notes = [_summary(found, fits)]
        if self.iterations and fits:
            fits, trained = self._trained(program, context, fits)
            notes.append(trained)
        done = _replaced(program, {name: fit.factors for name, fit in fits.items()})
        if not done.fired:
            return PassResult(program, False, (), tuple(found.rejected))
        done.program.level = Level.TARGET
        saved = 1 - done.program.parameter_bytes / program.parameter_bytes
        notes.append(f"{saved:.1%} of all bytes saved")
        return PassResult(done.program, True, done.fired, tuple(found.rejected), tuple(notes))

    def _fitted(self, program: Program, found: Candidates, context: Context) -> dict[str, _Fit]:
        """Return the factors of each weight; refuse those of which SVD makes more."""
        fits: dict[str, _Fit] = {}

        def fit_one(shared: Shared, factor: torch.Tensor | None) -> None:
            context.progress("fitting factors", len(fits), len(found.layers))
            outcome = self._best(shared.weight, factor)
            if isinstance(outcome, _Fit):
                fits[shared.weight_name] = outcome
            else:
                found.refuse(shared.weight_name, outcome)

        if self.whiten:
            seen_inputs(
                program,
                found,
                context,
                lambda shared, gram, count: fit_one(shared, whitening(gram, count)),
                otherwise="whiten=false",
            )
        else:
            for shared in list(found.layers.values()):
                fit_one(shared, None)
        return fits

    def _best(self, weight: torch.Tensor, factor: torch.Tensor | None) -> _Fit | str:
        outputs, inputs = weight.shape
        size = int(self.keep * weight.nbytes)
        sizes = {
            vectors: entries_within(size, outputs, inputs, vectors, weight.element_size())
            for vectors in _VECTORS
            if vectors <= inputs
        }
        fit = partial(fit_factors, weight, factor)
        tried = [
            (fit(vectors=vectors, entries=entries, iterations=_TRIED), entries)
            for vectors, entries in sizes.items()
            if entries
        ]
        if not tried:
            return f"in {self.keep:.0%} of its bytes there is no room for a basis and one entry for each output"
        best, entries = min(tried, key=lambda each: each[0].error)
        factors = fit(vectors=len(best.basis), entries=entries, iterations=_FITTED, start=best.basis)
        spectrum = decompose(weight, factor)
        plain = spectrum.lost(int(self.keep * break_even(outputs, inputs)))
        if factors.error >= plain:
            ratio = factors.error / plain if plain else float("inf")
            return (
                f"a product of dense matrices of as many bytes loses less: sparse factors lose {ratio:.2f} times that"
            )
        return _Fit(factors, factor, plain, spectrum.lost(0))

    def _trained(self, program: Program, context: Context, fits: Mapping[str, _Fit]) -> tuple[dict[str, _Fit], str]:
        found = reconstruct(
            program,
            program,
            context.calibration,
            {name: partial(_Factorized, program.parameters[name], fit) for name, fit in fits.items()},
            Settings(iterations=self.iterations, seed=context.seed),
            describes=(self.name, asdict(self)),
            blocks=cut_at(program, []),
            objective=_divergence(program),
            progress=context.progress,
        )
        trained = {name: fit.of(found.results[name]) for name, fit in fits.items()}
        (block,) = found.blocks
        return trained, (
            f"{block.iterations} steps of the straight-through factorizer: divergence of the answers, relative, "
            f"{block.before:.2e} before, {block.after:.2e} after"
        )


@dataclass(frozen=True)
class _Fit:
    """The factors of one weight, the metric they were fitted in, and the squared errors of SVD and of zeros."""

    factors: SparseFactors
    metric: torch.Tensor | None
    plain: float
    whole: float

    def of(self, weight: torch.Tensor) -> _Fit:
        """Return the factors of a weight near the one that these are of."""
        known = self.factors
        factors = fit_factors(
            weight,
            self.metric,
            vectors=len(known.basis),
            entries=known.places.shape[1],
            iterations=1,
            start=known.basis,
        )
        return _Fit(factors, self.metric, self.plain, self.whole)


class _Factorized(Free):
    """A full weight that is trained, and computed with as its factors: the straight-through factorizer."""

    def __init__(self, start: torch.Tensor, fit: _Fit) -> None:
        super().__init__(start)
        self._fit = fit

    def value(self) -> torch.Tensor:
        """Return the product of the factors; its gradient is taken for that of the weight."""
        known = self.leaf.detach()
        return self.leaf + (self.settled(known) - known)

    def settled(self, result: torch.Tensor) -> torch.Tensor:
        """Return the product of the factors of a weight."""
        return self._fit.of(result).factors.weight.to(result.dtype)


def _divergence(program: Program) -> Objective:
    """Return the objective: how far the first floating-point output is from the original's, as a distribution."""
    pairs = zip(program.outputs, program.results, strict=True)
    spec, result = next(pair for pair in pairs if value_of(pair[1]).is_floating_point())

    def diverges(attempt: Attempt) -> torch.Tensor:
        answers = []
        for outputs in (attempt.wanted, attempt.run(None)):
            value = outputs[result.name]
            valid = attempt.valid.get(result.name)
            if valid is not None and valid.shape[-1] == 1:
                value = value[valid.expand(*value.shape[:-1], 1).squeeze(-1)]
            answers.append(Answer(value.reshape(-1, value.shape[-1]), "logits" in spec.name))
        return answers[0].divergence(answers[1])

    return diverges


def _summary(found: Candidates, fits: Mapping[str, _Fit]) -> str:
    if not fits:
        return "no layer is factorized"
    errors = sum(fit.factors.error / fit.whole for fit in fits.values()) / len(fits)
    plain = sum(fit.plain / fit.whole for fit in fits.values()) / len(fits)
    return (
        f"{len(fits)} of {len(fits) + _refused(found)} weights factorized: squared error of their outputs "
        f"{errors:.2e}, by SVD of as many bytes {plain:.2e} (mean, relative)"
    )


def _refused(found: Candidates) -> int:
    return len({refusal.value for refusal in found.rejected})


def _replaced(program: Program, factors: Mapping[str, SparseFactors]) -> Rewritten:
    def factorize_sparse(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        if not is_call(node, xf.linear, xf.linear_activation) or str(operand(node, 1).target) not in factors:
            return None
        parts = linear_parts(editor, node)
        if isinstance(parts, Reject):
            return parts
        name = parts.weight_name
        made, dtype = factors[name], parts.weight.dtype
        places, bits = packed.setdefault(name, made.packed())
        stored = floats.setdefault(name, (made.basis.to(dtype).contiguous(), made.values.to(dtype).contiguous()))
        read = (
            editor.parameter(f"{name}.basis", stored[0]),
            editor.parameter(f"{name}.places", places),
            editor.parameter(f"{name}.values", stored[1]),
        )
        product = editor.call(xf.sparse_factor_linear, operand(node), *read, *bias_operand(parts), bits=bits)
        if is_call(node, xf.linear):
            return product
        return editor.call(xf.activation, product, function=arguments(node)["function"])

    packed: dict[str, tuple[torch.Tensor, int]] = {}
    floats: dict[str, Sequence[torch.Tensor]] = {}
    return rewrite(program, {"factorize-sparse": factorize_sparse}, sweeps=1)
