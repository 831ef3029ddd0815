"""The definition of the Memory Layer (MemoryFormer, Ding et al., NeurIPS 2024, arXiv 2411.12992, section 2.1).

    y = sum_k p(z_k) T_k[h(z_k)],    p(z) = exp(<z, s>) / sum_s' exp(<z, s'>) = prod_i 1 / (1 + exp(-2 |z_i| / t))

x is cut into K neighbouring parts z_k of b channels.  The signs s of a part are the place of a row in its table, and p
is how sure they are: the softmax, over all 2^b vectors of signs, of their product with z.  (The authors' released code
multiplies p by sum_i |z_i|, which the paper does not.)
"""

from __future__ import annotations

import torch

__all__ = ["hashed", "memory_linear"]


def memory_linear(
    x: torch.Tensor, tables: torch.Tensor, bias: torch.Tensor | None = None, *, temperature: float
) -> torch.Tensor:
    """Sum a row of each table, weighted by how sure its place is.

    Args:
        x: ``[..., K * b]``.
        tables: ``[K, 2^b, O]``; channel i of a part is bit i of the place, 1 where it is not negative.
        bias: ``[O]``.
        temperature: t.

    Returns:
        ``[..., O]``.

    """
    tables_count, entries, _ = tables.shape
    places, sureness = hashed(x, tables_count, temperature)
    starts = torch.arange(tables_count, device=x.device) * entries
    rows = tables.flatten(0, 1)[places + starts]  # [..., K, O]
    summed = (sureness.unsqueeze(-2) @ rows).squeeze(-2)
    return summed if bias is None else summed + bias


def hashed(x: torch.Tensor, tables: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the place in each table, int64 ``[..., K]``, and p, of the dtype of x."""
    parts = x.unflatten(-1, (tables, -1))
    powers = 2 ** torch.arange(parts.shape[-1], device=x.device)
    places = ((parts >= 0) * powers).sum(-1)
    return places, (parts.abs() * (2 / temperature)).sigmoid().prod(-1)
