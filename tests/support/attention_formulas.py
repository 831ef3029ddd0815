"""Kinds of attention by loops over batch, heads, queries and keys: slow, plain, and apart from the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

DOUBLE = torch.float64
# two heads of width 3 with values of width 5
HEADS, D, E = 2, 3, 5


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def by_loops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sees: Callable[[int, int, int, int], bool],
    scale: float,
    weigh: Callable[[list[float]], list[float]] = softmax,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query of one head at a time over the keys it ``sees(batch, head, query, key)``; a bias has no batch."""
    out = torch.zeros(q.shape[0], q.shape[1], HEADS * E, dtype=DOUBLE)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if sees(b, h, i, j)]
                query = q[b, i, h * D : (h + 1) * D]
                logits = [scale * float(query @ k[b, j, h * D : (h + 1) * D]) for j in keys]
                if bias is not None:
                    logits = [x + float(bias[0, h, i, j]) for x, j in zip(logits, keys, strict=True)]
                weights = weigh(logits) if keys else []
                for j, weight in zip(keys, weights, strict=True):
                    out[b, i, h * E : (h + 1) * E] += weight * v[b, j, h * E : (h + 1) * E]
    return out


def local(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    window_left: int,
    window_right: int = 0,
    dilation: int = 1,
    stripe: int = 0,
    causal: bool = False,
) -> torch.Tensor:
    window = [n * dilation for n in range(-window_right, window_left + 1)]

    def sees(b: int, h: int, i: int, j: int) -> bool:
        exists = mask is None or bool(mask[b, j])
        in_stripe = stripe > 0 and (i - j) % stripe == 0
        return exists and (i - j in window or in_stripe) and (j <= i or not causal)

    return by_loops(q, k, v, sees, scale, bias=bias)


def channels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: torch.Tensor, mask: Any = None, *, heads: int, top: int = 0
) -> Any:
    width = q.shape[2] // heads
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        tokens = [i for i in range(q.shape[1]) if mask is None or mask[b, i]]
        for c in range(q.shape[2]):
            head = range(c // width * width, (c // width + 1) * width)
            mine = q[b, tokens, c]
            logits = []
            for e in head:
                theirs = k[b, tokens, e]
                size = math.sqrt(float(mine @ mine)) * math.sqrt(float(theirs @ theirs))
                logits.append(float(t[c // width]) * (float(mine @ theirs) / size if tokens else 0.0))
            least = sorted(logits)[-top]
            chosen = [(x, e) for x, e in zip(logits, head, strict=True) if x >= least or not top]
            weights = softmax([x for x, _ in chosen])
            out[b, tokens, c] = sum(w * v[b, tokens, e] for w, (_, e) in zip(weights, chosen, strict=True))
    return out


def block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    causal: bool = False,
) -> torch.Tensor:
    def sees(b: int, h: int, i: int, j: int) -> bool:
        exists = mask is None or bool(mask[b, j])
        return exists and bool(blocks[h % len(blocks), i // block, j // block]) and (j <= i or not causal)

    return by_loops(q, k, v, sees, scale, bias=bias)


def multi_resolution(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    keep: float,
    causal: bool = False,
    coarse: bool = True,
) -> torch.Tensor:
    """One head at a time: rank the blocks, then weigh the keys of each query one by one; a bias has no batch."""
    T = q.shape[1]
    out = torch.zeros_like(v)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(heads)):
        mine, theirs = q[b, :, h * D : h * D + D], k[b, :, h * D : h * D + D]
        values = v[b, :, h * E : h * E + E]
        whole = [[t for t in range(n, min(n + block, T)) if mask is None or mask[b, t]] for n in range(0, T, block)]
        N = len(whole)

        def logit(i: int, j: int, mine: Any = mine, theirs: Any = theirs, h: int = h) -> float:
            return scale * float(mine[i] @ theirs[j]) + (
                0.0 if bias is None else float(bias[0, h % bias.shape[1], i, j])
            )

        def coarse_logit(n: int, m: int, whole: Any = whole, logit: Any = logit) -> float:
            """The logit is linear in q and in k, so that of the means is the mean."""
            found = [logit(i, j) for i in whole[n] for j in whole[m]]
            return sum(found) / len(found) if found else 0.0

        seen = [(n, m) for n in range(N) for m in range(N) if whole[m] and (m <= n or not causal)]
        others = sorted((nm for nm in seen if nm[0] != nm[1] and whole[nm[0]]), key=lambda nm: -coarse_logit(*nm))
        total = N * (N + 1) // 2 if causal else N * N
        room = max(N, math.ceil(keep * total)) - N
        exact = {(n, n) for n in range(N)} | set(others[:room])
        for i in range(T):
            weights: dict[int, float] = {}
            for m in (m for n, m in seen if n == i // block):
                for j in whole[m]:
                    if (i // block, m) in exact:
                        if j <= i or not causal:
                            weights[j] = math.exp(logit(i, j))
                    elif coarse:
                        weights[j] = math.exp(coarse_logit(i // block, m))
            for j, weight in weights.items():
                out[b, i, h * E : h * E + E] += weight / sum(weights.values()) * values[j]
    return out


def entmax_weights(alpha: float) -> Callable[[list[float]], list[float]]:
    """Bisect the threshold until its bracket has no number inside."""

    def weigh(logits: list[float]) -> list[float]:
        scaled = [(alpha - 1) * x for x in logits]
        low, high = max(scaled) - 1, max(scaled)
        for _ in range(200):
            middle = (low + high) / 2
            total = sum(max(x - middle, 0.0) ** (1 / (alpha - 1)) for x in scaled)
            low, high = (middle, high) if total > 1 else (low, middle)
        return [max(x - low, 0.0) ** (1 / (alpha - 1)) for x in scaled]

    return weigh


def entmax_by_loops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    alpha: float = 1.5,
    causal: bool = False,
) -> torch.Tensor:
    def sees(b: int, h: int, i: int, j: int) -> bool:
        return (mask is None or bool(mask[b, j])) and (j <= i or not causal)

    return by_loops(q, k, v, sees, scale, entmax_weights(alpha))


def flow(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    *,
    heads: int,
    causal: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """For each query all flows of the tokens that count for it anew, from the matrix of products."""
    T, S = q.shape[1], k.shape[1]
    out = torch.zeros(q.shape[0], T, HEADS * E, dtype=DOUBLE)
    for b in range(q.shape[0]):
        queries = [i for i in range(T) if query_mask is None or query_mask[b, i]]
        keys = [j for j in range(S) if key_mask is None or key_mask[b, j]]
        for h in range(HEADS):
            qs, ks = q[b, :, h * D : (h + 1) * D].sigmoid(), k[b, :, h * D : (h + 1) * D].sigmoid()

            def dot(x: torch.Tensor, total: Any) -> torch.Tensor:
                return ((x + eps) * (total + eps)).sum()

            def before(tokens: list[int], i: int) -> list[int]:
                return [t for t in tokens if t <= i] if causal else tokens

            def count(i: int, keys: list[int] = keys) -> int:
                return len(before(keys, i)) if causal else 1

            flow_in = {i: count(i) / dot(qs[i], sum(ks[j] for j in before(keys, i))) for i in queries}
            flow_out = {j: count(j) / dot(ks[j], sum(qs[i] for i in before(queries, j))) for j in keys}
            kept = {
                j: (dot(ks[j], sum(qs[i] * flow_in[i] for i in before(queries, j))) / count(j)).clamp(-1, 1).exp()
                for j in keys
            }
            for i in queries:
                seen = before(keys, i)
                if not seen:
                    continue
                allocation = dot(qs[i], sum(ks[j] * flow_out[j] for j in seen)) / count(i)
                if not causal:
                    allocation = allocation * len(queries) / len(keys)
                for j in seen:
                    n = len(before(keys, j)) if causal else len(keys)
                    share = kept[j] / sum(kept[m] for m in before(keys, j)) * n
                    weight = float(qs[i] @ ks[j]) * flow_in[i] / count(i) * share * allocation.sigmoid()
                    out[b, i, h * E : (h + 1) * E] += weight * v[b, j, h * E : (h + 1) * E]
    return out


def one_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *, heads: int, scale: float
) -> torch.Tensor:
    def sees(b: int, h: int, i: int, j: int) -> bool:
        return (mask is None or bool(mask[b, j])) and j <= i

    return by_loops(q.expand(*k.shape), k, v, sees, scale)


def toeplitz(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    w: torch.Tensor | None = None,
    *,
    heads: int,
    causal: bool = False,
) -> torch.Tensor:
    """The weight of each pair by itself."""

    def phi(x: torch.Tensor, h: int) -> torch.Tensor:
        unit = x[h * D : (h + 1) * D]
        if w is None:
            return unit
        unit = unit / math.sqrt(float(unit @ unit))
        return torch.exp(unit @ w[h] - 0.5) / math.sqrt(w.shape[2])

    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for i in range(q.shape[1]):
                keys = [j for j in range(q.shape[1]) if (mask is None or mask[b, j]) and (j <= i or not causal)]
                middle = bias.shape[1] // 2
                c = [math.exp(bias[h % len(bias), middle + j - i]) for j in keys]
                weights = [c[n] * float(phi(q[b, i], h) @ phi(k[b, j], h)) for n, j in enumerate(keys)]
                for j, weight in zip(keys, weights, strict=True):
                    out[b, i, h * E : (h + 1) * E] += weight / sum(weights) * v[b, j, h * E : (h + 1) * E]
    return out


def manhattan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    heads: int,
    scale: float,
    rows: int,
    columns: int,
    decomposed: bool = False,
) -> torch.Tensor:
    gamma = log_decay.exp().tolist()

    def attend(values: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
        out = torch.zeros_like(values)
        for b in range(q.shape[0]):
            for h in range(HEADS):
                for group in groups:
                    for i in group:
                        query = q[b, i, h * D : (h + 1) * D]
                        weights = softmax([scale * float(query @ k[b, j, h * D : (h + 1) * D]) for j in group])
                        for j, weight in zip(group, weights, strict=True):
                            far = abs(i // columns - j // columns) + abs(i % columns - j % columns)
                            value = values[b, j, h * E : (h + 1) * E]
                            out[b, i, h * E : (h + 1) * E] += weight * gamma[h] ** far * value
        return out

    if not decomposed:
        return attend(v, [list(range(rows * columns))])
    across = attend(v, [[y * columns + x for x in range(columns)] for y in range(rows)])
    return attend(across, [[y * columns + x for y in range(rows)] for x in range(columns)])
