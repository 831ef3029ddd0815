"""The selective scan in Triton: every channel and state decays on its own, so a chunk is a scan and no product.

As in Mamba (Gu and Dao, arXiv 2312.00752, section 3.3.2), states live in registers and never reach memory; the tokens
of a chunk are joined by a parallel scan over pairs (decay, what was added), which is associative.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["selective_chunks"]


@triton.jit
def _join(decay, added, later_decay, later_added):
    """Two stretches of tokens as one."""
    return decay * later_decay, added * later_decay + later_added


@triton.jit
def selective_chunks(
    x,
    dt,
    a,
    b,
    c,
    d,
    out,
    T,
    x_batch,
    x_row,
    dt_batch,
    dt_row,
    b_batch,
    b_row,
    c_batch,
    c_row,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = c_t . h_t + d x_t``: programs are ``(channels, sequences)``.

    Args:
        x: Inputs, one row a token, ``x_row`` apart; sequences ``x_batch`` apart; ``dt``, ``b`` and ``c`` alike.
        dt: Step sizes of each channel.
        a: Rates, ``[WIDTH, N]``, contiguous.
        b: What writes to the states, ``N`` a token.
        c: What reads them.
        d: How much of the input is added, ``[WIDTH]``, contiguous; None: nothing.
        out: ``[B, T, WIDTH]``, contiguous.
        T: Tokens of a sequence.
        x_batch: See ``x``.
        x_row: See ``x``.
        dt_batch: See ``x``.
        dt_row: See ``x``.
        b_batch: See ``x``.
        b_row: See ``x``.
        c_batch: See ``x``.
        c_row: See ``x``.
        WIDTH: Channels.
        N: States of a channel.
        L: Tokens of a chunk.
        M: Channels of a program.
        WIDE: ``N`` rounded up to a power of two.

    """
    channels, batch = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1).to(tl.int64)
    tokens, states = tl.arange(0, L), tl.arange(0, WIDE)
    is_channel, is_state = channels < WIDTH, states < N
    place = a + channels[:, None] * N + states[None, :]
    rates = tl.load(place, mask=is_channel[:, None] & is_state[None, :], other=0.0).to(tl.float32)
    x += batch * x_batch
    dt += batch * dt_batch
    b += batch * b_batch
    c += batch * c_batch
    out += batch * T * WIDTH
    state = tl.zeros([M, WIDE], tl.float32)
    for start in range(0, T, L):
        at = start + tokens
        is_token = at < T
        here, there = is_token[:, None] & is_channel[None, :], is_token[:, None] & is_state[None, :]
        inputs = tl.load(x + at[:, None] * x_row + channels[None, :], mask=here, other=0.0).to(tl.float32)
        # a token behind the end takes no step: states stay as they are
        steps = tl.load(dt + at[:, None] * dt_row + channels[None, :], mask=here, other=0.0).to(tl.float32)
        write = tl.load(b + at[:, None] * b_row + states[None, :], mask=there, other=0.0).to(tl.float32)
        read = tl.load(c + at[:, None] * c_row + states[None, :], mask=there, other=0.0).to(tl.float32)
        decay = tl.exp(steps[:, :, None] * rates[None, :, :])
        added = (steps * inputs)[:, :, None] * write[:, None, :]
        passed, reached = tl.associative_scan((decay, added), 0, _join)
        reached += passed * state[None, :, :]
        found = tl.sum(reached * read[:, None, :], 2)
        if d is not None:
            found += inputs * tl.load(d + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at[:, None] * WIDTH + channels[None, :], found.to(out.dtype.element_ty), mask=here)
        state = tl.sum(tl.where((tokens == L - 1)[:, None, None], reached, 0.0), 0)
