"""What the answer of a program loses, to first order, with each block of attention that is not computed.

Without key j, query i gets ``o_i - A_ij / (1 - A_ij) (v_j - o_i)``, which for small weights moves the log-likelihood L
of an answer by ``-A_ij dL/do_i . (v_j - o_i)``.  Summed over a block, squared, and averaged over samples and over
answers that the model draws itself, this is (twice) how far the answer moves in the sense of ``KL(p || p')``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.kernels.chunks import split_heads
from xformopt.match import arguments
from xformopt.passes.answers import Answer, answer_of
from xformopt.passes.sparsify.support.attention_maps import BlockMap, in_blocks, weights_of
from xformopt.program import Program
from xformopt.reconstruction.blocks import cut_at
from xformopt.reconstruction.values import run_block

__all__ = ["collect_losses"]

# answers drawn for each sample
_DRAWS = 4
# where one key is nearly all that a query sees, the first order has no bound: what others get counts as at least this
_SMALLEST_REST = 0.05


def collect_losses(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    maps: Mapping[str, BlockMap],
    *,
    block: int,
    capture: int | None,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, torch.Tensor]:
    """Return what each block of the attentions in ``maps`` is worth to the answer, ``[H, N, N]`` float64, summed.

    Args:
        program: A lifted program, through which gradients pass.
        batches: Calibration data.
        maps: The mean attention, by name; it tells how many blocks there are.
        block: Tokens of a block.
        capture: How many tokens of a sequence are looked at; None: all.
        seed: Of the answers drawn.
        progress: Called with (what, done, total).

    """
    found = {name: torch.zeros_like(known.mass) for name, known in maps.items()}
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(batches):
        progress("differentiating", number, len(batches))
        seen, answer = _watched(program, batch, maps)
        for draw in range(_DRAWS if answer.rows.requires_grad else 0):
            answer.log_likelihood_of_draws(generator).backward(retain_graph=draw + 1 < _DRAWS)
            for name, watched in seen.items():
                loss = watched.losses(block, capture)
                found[name][:, : loss.shape[1], : loss.shape[1]] += loss
    return found


@dataclass
class _Watched:
    """One attention as it ran: its weights ``[B, H, T, S]``, values ``[B, H, S, E]`` and what it gave."""

    weights: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor

    def losses(self, block: int, capture: int | None) -> torch.Tensor:
        """Return the loss of each block, ``[H, N, N]`` float64, and forget the gradient."""
        heads = self.weights.shape[1]
        if self.output.grad is None:
            return torch.zeros(heads, 1, 1, dtype=torch.float64)
        felt = split_heads(self.output.grad, heads)  # dL/do, [B, H, T, E]
        own = (felt * split_heads(self.output.detach(), heads)).sum(-1, keepdim=True)
        self.output.grad = None
        odds = self.weights / (1 - self.weights).clamp(min=_SMALLEST_REST)
        moved = odds * (felt @ self.values.transpose(-1, -2) - own)
        return in_blocks(moved[:, :, :capture, :capture].double(), block).square().sum(0)


def _watched(
    program: Program, batch: Mapping[str, torch.Tensor], names: Collection[str]
) -> tuple[dict[str, _Watched], Answer]:
    """Run a program, and return its answer, differentiable by what the attentions gave."""
    found: dict[str, _Watched] = {}

    def watch(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        if node.name not in names:
            return value
        given = arguments(node)
        with torch.no_grad():
            v = split_heads(values[given["v"]].detach(), given["kv_heads"])
            v = v.repeat_interleave(given["heads"] // given["kv_heads"], 1)  # [B, H, S, E]
            weights = weights_of(node, values)
        if value.requires_grad:
            value.retain_grad()
        else:
            value.requires_grad_()
        found[node.name] = _Watched(weights, v, value)
        return value

    (whole,) = cut_at(program, [])
    with torch.enable_grad():
        outputs = run_block(program, whole, program.completed(batch), transform=watch)
        by_name = {spec.name: outputs[node.name] for spec, node in zip(program.outputs, program.results, strict=True)}
        return found, answer_of(program, by_name, batch)
