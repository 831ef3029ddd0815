"""The definition of attention with logarithmic weights: ``xf.log_quantize`` between the halves of ``xf.attention``.

    p = softmax(scale q k^T + ...),    c_ij = round(-(r / q) log2(p_ij / s)),    y_i = sum_j level(c_ij) v_j

As there are few codes, the sum over keys is one over codes, ``y_i = sum_c level(c) (sum of v_j where c_ij = c)``:
additions for every key, and as ``level`` is a shift and a table of few bits, shifts and additions for every code
(AdaLog, Wu et al., ECCV 2024, arXiv 2407.12951).
"""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention.reference import attention_values, attention_weights
from xformopt.kernels.log_quantize.reference import log_quantize

__all__ = ["log_attention"]


def log_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    level_scale: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_log_size: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    bits: int,
    numerator: int,
    denominator: int,
    round_table: bool = False,
    flush: bool = True,
    **hiding: Any,
) -> torch.Tensor:
    """Sum the values by rounded weights.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, S, kv_heads * D]``.
        v: Values, ``[B, S, kv_heads * E]``.
        level_scale: The largest weight that a code stands for, a scalar: s.
        key_mask: See ``xf.attention``, as for ``bias`` and ``key_log_size``.
        bias: Added to the logits.
        key_log_size: Log of how many tokens each key stands for.
        heads: Query heads.
        kv_heads: Key/value heads.
        bits: Of a code, 2 to 8.
        numerator: q of the base ``2^(q / r)``.
        denominator: r.
        round_table: See ``xf.log_quantize``, as for ``flush``.
        flush: Whether weights below the smallest level become 0, or that level.
        **hiding: ``scale``, ``causal``, ``window_left`` and ``window_right`` of ``xf.attention``.

    Returns:
        ``[B, T, heads * E]``.

    """
    weights = attention_weights(q, k, key_mask, bias, key_log_size, heads=heads, kv_heads=kv_heads, **hiding)
    rounded = log_quantize(
        weights,
        level_scale,
        bits=bits,
        numerator=numerator,
        denominator=denominator,
        round_table=round_table,
        flush=flush,
    )
    return attention_values(rounded, v, heads=heads, kv_heads=kv_heads)
