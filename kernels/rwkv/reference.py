"""The definitions of RWKV-4's time mixing: by chunks (the operator), over all pairs and recurrent.

Weights are exponentials of keys, which may be large: a sum of them is kept beside the logarithm it is scaled by, the
largest exponent so far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xformopt.kernels.chunks import CHUNK, in_chunks

__all__ = ["rwkv", "rwkv_masked", "rwkv_start", "rwkv_step"]


class _Sum(NamedTuple):
    """Weighted values ``exp(peak) values`` and their weights ``exp(peak) weights``."""

    values: torch.Tensor
    weights: torch.Tensor
    peak: torch.Tensor

    def aged(self, log_decay: torch.Tensor) -> _Sum:
        """Return the sum after the time in which it fades by ``exp(log_decay)``."""
        return _Sum(self.values, self.weights, self.peak + log_decay)

    def plus(self, other: _Sum) -> _Sum:
        """Return both sums together."""
        peak = torch.maximum(self.peak, other.peak)
        mine, theirs = (self.peak - peak).exp(), (other.peak - peak).exp()
        values = mine * self.values + theirs * other.values
        return _Sum(values, mine * self.weights + theirs * other.weights, peak)

    def mean(self) -> torch.Tensor:
        """Return the weighted mean of the values."""
        return self.values / self.weights


def _nothing(like: torch.Tensor) -> _Sum:
    """Return a sum of nothing; its peak is far below any exponent, and finite."""
    zeros = torch.zeros_like(like)
    return _Sum(zeros, zeros, zeros + torch.finfo(like.dtype).min / 4)


def rwkv(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    bonus: torch.Tensor,
    *,
    bidirectional: bool = False,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """The mean of the values so far, value i at t weighted ``exp(k_i + (t - 1 - i) log_decay)``.

    The token's own value is weighted ``exp(k_t + bonus)``.  Equation 14 of RWKV (Peng et al., arXiv 2305.13048), each
    channel by itself.  Bidirectional, it is the mean of all values, weighted ``exp(k_i + (|t - i| - 1) log_decay)``
    (Vision-RWKV, Duan et al., arXiv 2403.02308, equation 3, where ``log_decay`` is ``-w / T``).

    Args:
        k: Keys, ``[B, T, C]``.
        v: Values, ``[B, T, C]``.
        log_decay: What a weight loses with each token, ``[C]``, not positive: the paper's ``-w``.
        bonus: The paper's ``u``, ``[C]``.
        bidirectional: Whether later tokens count as well.
        chunk: Tokens of a chunk; the result does not depend on it.

    Returns:
        ``[B, T, C]``.

    """
    others = _before(k, v, log_decay, chunk)
    if bidirectional:
        later = _before(k.flip(1), v.flip(1), log_decay, chunk)
        others = others.plus(_Sum(*(x.flip(1) for x in later)))
    return others.plus(_Sum(v, torch.ones_like(v), k).aged(bonus)).mean()


def _before(k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, chunk: int) -> _Sum:
    """Return the sum over all tokens before each, ``[B, T, C]``.

    All chunks take their first token at once, then their second, and so on; what came before a chunk is added
    afterwards.
    """
    keys, values = (in_chunks(x.unsqueeze(1), chunk).squeeze(1) for x in (k, v))  # [B, n, L, C]
    token = _Sum(values, torch.ones_like(values), keys)
    inside = _nothing(keys[:, :, 0])  # [B, n, C]
    before_token = []
    for t in range(chunk):
        before_token.append(inside)
        inside = inside.aged(log_decay).plus(_Sum(*(x[:, :, t] for x in token)))
    state = _nothing(keys[:, 0, 0])  # [B, C]
    before_chunk = []
    for n in range(keys.shape[1]):
        before_chunk.append(state)
        state = state.aged(chunk * log_decay).plus(_Sum(*(x[:, n] for x in inside)))
    age = torch.arange(chunk, dtype=k.dtype, device=k.device)[:, None]  # [L, 1]
    older = _Sum(*(torch.stack(x, 1).unsqueeze(2) for x in zip(*before_chunk, strict=True)))  # [B, n, 1, C]
    past = older.aged(age * log_decay).plus(_Sum(*(torch.stack(x, 2) for x in zip(*before_token, strict=True))))
    return _Sum(*(x.flatten(1, 2)[:, : k.shape[1]] for x in past))


def rwkv_masked(
    k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, bonus: torch.Tensor, *, bidirectional: bool = False
) -> torch.Tensor:
    """The form of attention: for each channel a softmax over all tokens that count; quadratic in T."""
    at = torch.arange(k.shape[1], device=k.device)
    back = (at[:, None] - at).unsqueeze(-1)  # [T, T, 1]
    exponents = torch.where(back == 0, bonus, (back.abs() - 1) * log_decay)
    if not bidirectional:
        exponents = exponents.masked_fill(back < 0, float("-inf"))
    weights = (exponents + k.unsqueeze(1)).softmax(2)  # [B, T, T, C]
    return (weights * v.unsqueeze(1)).sum(2)


def rwkv_start(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the state before the first token, for keys of a token ``[B, C]``: values, weights and peak."""
    return _nothing(k)


def rwkv_step(
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    bonus: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """One token ``[B, C]`` and the state (values, weights and peak, ``[B, C]``) to the next state and ``[B, C]``."""
    past, token = _Sum(*state), _Sum(v, torch.ones_like(v), k)
    return past.aged(log_decay).plus(token), past.plus(token.aged(bonus)).mean()
