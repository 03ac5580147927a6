"""Triton kernels of the three short convolutions of a KDA layer, where no graph is recorded.

`short_convolution` three times and `l2norm` of q's and k's heads (their torch forms are the
reference) in one launch, which writes the state after the last token on the way: at 4,096 tokens
the launches of a layer take longer than its arithmetic.

Shapes: B batch, T tokens, H heads, K their size, D = H * K channels, W taps, N packed sequences.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (a kernel's arguments and tuples are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_linear.ops.kda.recurrent import L2NORM_EPS
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, jit, power_of_two, tl

# Tokens of a block, of one head; blocks of a program, which loads its taps once for them; tokens of
# a program where sequences are packed.
TOKENS, BLOCKS, PACKED_TOKENS = 16, 4, 32


def convolve_three(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor | None,
    head_dim: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """SiLU of three causal depthwise convolutions, each over its own input; the first two are
    normalised by head.

    Args:
        inputs: three [B, T, D].
        weights: three [D, 1, W], oldest tap first.
        state: the W - 1 inputs before the first token, [B, 3, D, W - 1], or [N, ...]; None for
            zeros.
        head_dim: K.
        cu_seqlens: [N + 1] int32, ends of packed sequences, with B = 1; some may be empty.

    Returns:
        three outputs [B, T, D]; the state after the last token, [B, 3, D, W - 1], or [N, ...].
    """
    B, T, D = inputs[0].shape
    W = weights[0].shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    inputs, weights = [x.contiguous() for x in inputs], [x.contiguous() for x in weights]
    outputs = [torch.empty_like(x) for x in inputs]
    after = inputs[0].new_empty(N, 3, D, W - 1)
    state = state if state is None else state.contiguous()
    sizes = {"EPS": L2NORM_EPS, "K": head_dim, "W": W, "CHANNELS": power_of_two(head_dim)}
    tensors = (*inputs, *weights, *outputs, state, after)
    heads = D // head_dim
    with torch.cuda.device_of(inputs[0]):
        if cu_seqlens is None:
            programs = ceil_div(T, BLOCKS * TOKENS)
            sizes |= {"TOKENS": TOKENS, "BLOCKS": BLOCKS}
            _convolve[(programs, heads, 3 * B)](*tensors, T, D, **sizes)
        else:  # sequences have programs of their own, which write their states
            blocks, sizes["TOKENS"] = ceil_div(T, PACKED_TOKENS), PACKED_TOKENS
            _convolve_packed[(blocks + N, heads, 3)](*tensors, cu_seqlens, T, N, D, **sizes)
    return outputs, after


@jit
def _activated(total, which, EPS: tl.constexpr):
    """SiLU of [tokens, channels], of a head; of q and k normalised."""
    y = total * tl.sigmoid(total)
    scale = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) + EPS)
    return y * tl.where(which < 2, scale, 1.0)[:, None]


@jit
def _last_input(x, state, token, channel, inside, D, W: tl.constexpr):
    """The input at a token that may lie before the first one: in the state, or zeros."""
    value = tl.load(x + token.to(tl.int64) * D + channel, mask=inside & (token >= 0), other=0.0)
    if state is not None:
        place = state + channel * (W - 1) + token + W - 1
        value += tl.load(place, mask=inside & (token < 0), other=0.0)
    return value


@launch_directly
@jit(counts=("T",))
def _convolve(
    x0,
    x1,
    x2,
    weight0,
    weight1,
    weight2,
    out0,
    out1,
    out2,
    state,
    after,
    T,
    D,
    EPS: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of so many tokens, which a program takes in turn
    CHANNELS: tl.constexpr,  # K, or more, a power of two
):
    row = tl.program_id(2).to(tl.int64)
    which = row % 3
    if which == 0:
        x, weight, out = x0, weight0, out0
    elif which == 1:
        x, weight, out = x1, weight1, out1
    else:
        x, weight, out = x2, weight2, out2
    x += row // 3 * T * D
    out += row // 3 * T * D
    if state is not None:
        state += row * D * (W - 1)
    is_own = tl.arange(0, CHANNELS)[None, :] < K
    channel = tl.program_id(1) * K + tl.arange(0, CHANNELS)[None, :]
    factors = ()
    for tap in tl.static_range(W):
        factor = tl.load(weight + channel * W + tap, mask=is_own, other=0.0)
        factors = factors + (factor.to(tl.float32),)
    begin = tl.program_id(0) * BLOCKS * TOKENS
    x_start, out_start = x + begin.to(tl.int64) * D, out + begin.to(tl.int64) * D
    for block in tl.static_range(BLOCKS):
        token = begin + block * TOKENS + tl.arange(0, TOKENS)[:, None]
        own = (block * TOKENS + tl.arange(0, TOKENS)[:, None]) * D + channel
        inside = (token < T) & is_own
        total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
        for tap in tl.static_range(W):
            source = token + (tap - W + 1)
            there = inside & (source >= 0)
            value = tl.load(x_start + own + (tap - W + 1) * D, mask=there, other=0.0)
            total += factors[tap] * value.to(tl.float32)
            if block * TOKENS < W - 1 and state is not None:
                if begin == 0:
                    before = state + channel * (W - 1) + token + tap
                    old = tl.load(before, mask=inside & (source < 0), other=0.0)
                    total += factors[tap] * old.to(tl.float32)
        total = _activated(total, which, EPS)
        tl.store(out_start + own, total.to(out.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        for column in tl.static_range(W - 1):
            place = row * D * (W - 1) + channel * (W - 1) + column
            offset = tl.full((1, CHANNELS), column - W + 1, dtype=tl.int32)
            last = _last_input(x, state, T + offset, channel, is_own, D, W)
            tl.store(after + place, last, mask=is_own)


@jit
def _sequence_of(token, cu_seqlens, N):
    """The last sequence that begins at a token or before it, which is the one that it is in."""
    low = token * 0
    high = low + N
    for _ in range(32):  # bits of an index, at most; then it is `low`
        middle = (low + high) // 2
        is_behind = tl.load(cu_seqlens + middle) <= token
        low = tl.where(is_behind, middle, low)
        high = tl.where(is_behind, high, middle)
    return low


@jit
def _write_state(x, state, after, cu_seqlens, sequence, which, channel, is_own, D, W: tl.constexpr):
    """One convolution's state after a sequence."""
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    x += start.to(tl.int64) * D
    own = (sequence.to(tl.int64) * 3 + which) * D * (W - 1)
    if state is not None:
        state += own
    for column in tl.static_range(W - 1):
        token = tl.full(channel.shape, column - W + 1, dtype=tl.int32) + length
        value = _last_input(x, state, token, channel, is_own, D, W)
        tl.store(after + own + channel * (W - 1) + column, value, mask=is_own)


@launch_directly
@jit(counts=("T", "N"))
def _convolve_packed(
    x0,
    x1,
    x2,
    weight0,
    weight1,
    weight2,
    out0,
    out1,
    out2,
    state,
    after,
    cu_seqlens,
    T,
    N,
    D,
    EPS: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,  # K, or more, a power of two
):
    which = tl.program_id(2)
    if which == 0:
        x, weight, out = x0, weight0, out0
    elif which == 1:
        x, weight, out = x1, weight1, out1
    else:
        x, weight, out = x2, weight2, out2
    is_own = tl.arange(0, CHANNELS)[None, :] < K
    channel = tl.program_id(1) * K + tl.arange(0, CHANNELS)[None, :]
    blocks = (T + TOKENS - 1) // TOKENS
    if tl.program_id(0) >= blocks:
        ended = tl.program_id(0) - blocks
        _write_state(x, state, after, cu_seqlens, ended, which, channel, is_own, D, W)
    else:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
        inside = (token < T) & is_own
        own = _sequence_of(tl.program_id(0) * TOKENS, cu_seqlens, N)
        last = _sequence_of(tl.program_id(0) * TOKENS + TOKENS - 1, cu_seqlens, N)
        sequence, start = token * 0 + own, token * 0 + tl.load(cu_seqlens + own)
        for other in range(own + 1, last + 1):
            begins = tl.load(cu_seqlens + other)
            sequence = tl.where(token < begins, sequence, other)
            start = tl.where(token < begins, start, begins)
        place = token.to(tl.int64) * D + channel
        total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
        for tap in tl.static_range(W):
            factor = tl.load(weight + channel * W + tap, mask=is_own, other=0.0)
            source = token + (tap - W + 1)
            value = tl.load(
                x + place + (tap - W + 1) * D, mask=inside & (source >= start), other=0.0
            )
            total += factor.to(tl.float32) * value.to(tl.float32)
            if state is not None:
                before = state + ((sequence.to(tl.int64) * 3 + which) * D + channel) * (W - 1)
                column = source - start + W - 1
                old = tl.load(before + column, mask=inside & (source < start), other=0.0)
                total += factor.to(tl.float32) * old.to(tl.float32)
        total = _activated(total, which, EPS)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
