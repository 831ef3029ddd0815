"""The definition of attention by binary codes (EcoFormer, Liu et al., NeurIPS 2022, arXiv 2209.09004).

    out_i = sum_j w_ij v_j / (sum_j w_ij + eps),    w_ij = H_i . H_j + b = 2 (b - d(c_i, c_j))

with codes H of -1 and 1, stored as the bits c, and their Hamming distance d.  As the weight of a pair is twice the
number of bits that agree, a sum over keys needs additions alone: bit r of a query chooses between the sum of the values
whose keys have that bit, and the sum of the others.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.linear_attention.reference import linear_attention
from xformopt.kernels.packing import unpack

__all__ = ["hamming_attention"]


def hamming_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    bits: int,
    causal: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Average the values, each weighted by the bits in which its key agrees with the query.

    Args:
        q: The codes of queries, bits packed (``xf.pack_bits``), uint8, ``[B, T, heads * ceil(b / 8)]``.
        k: Those of keys, ``[B, S, heads * ceil(b / 8)]``; causal attention has ``S = T``.
        v: Values, ``[B, S, heads * E]``.
        key_mask: Which keys exist, ``[B, S]`` bool (True: attend).
        heads: Number of heads.
        bits: Of a code, b.
        causal: A token attends to itself and to those before it.
        eps: Added to the sum of weights.

    Returns:
        ``[B, T, heads * E]``.

    """
    queries, keys = (_signs(x, heads, bits, v.dtype) for x in (q, k))
    # one feature more, so that a product of features is H_i . H_j + b
    features = (functional.pad(queries, (0, 1), value=bits), functional.pad(keys, (0, 1), value=1))
    flat_q, flat_k = (x.flatten(2) for x in features)
    return linear_attention(flat_q, flat_k, v, key_mask, heads=heads, feature="given", causal=causal, eps=eps)


def _signs(codes: torch.Tensor, heads: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return codes of -1 and 1, ``[B, T, heads, b]``."""
    signs: torch.Tensor = unpack(codes.unflatten(-1, (heads, -1)), 1, bits).to(dtype) * 2 - 1
    return signs
