"""Triton kernels of a KDA layer's three short convolutions in training, side by side in one tensor.

`short_convolution` with SiLU three times and `l2norm` of q's and k's heads (their torch forms are
the reference), forward and backward in one launch each. Inputs are columns of the joint product
that `training.py` makes, and their gradient is written back in that form. Backward reads each
number once: a program goes through its tokens one by one and keeps the last three in registers.
Sums are in float32, in a fixed order.

Shapes: M tokens, rows or packed sequences end to end; H heads, K their size, D = H * K channels of
one convolution; N columns.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_linear.ops.kda.recurrent import L2NORM_EPS
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, jit, power_of_two, tl

WIDTH = 4  # fewer taps are filled up with zeros, the oldest first
TOKENS = 32  # of a program, forward; of one head
STEPS = 64  # of a program, backward: its tokens and the three behind them


def convolve_columns(
    y: Tensor, taps: Tensor, starts: Tensor | None, row: int, head_dim: int
) -> Sequence[Tensor]:
    """SiLU of three causal depthwise convolutions over the first 3 D columns; the first two are
    normalised by head.

    Args:
        y: [M, N], its columns contiguous.
        taps: [3, D, 4], oldest first.
        starts: [M] int32, of each token the first of its sequence; None for rows of `row` tokens.
        row: tokens of a row.
        head_dim: K.

    Returns:
        three outputs [M, D].
    """
    M, D = y.shape[0], taps.shape[1]
    outputs = y.new_empty(3, M, D).unbind()
    if M:
        grid = (ceil_div(M, TOKENS), D // head_dim, 3)
        with torch.cuda.device_of(y):
            _convolve_columns[grid](
                y,
                taps,
                starts,
                *outputs,
                M,
                row,
                D,
                y.stride(0),
                EPS=L2NORM_EPS,
                K=head_dim,
                TOKENS=TOKENS,
                CHANNELS=power_of_two(head_dim),
            )
    return outputs


def convolve_columns_backward(
    grads: Sequence[Tensor],
    y: Tensor,
    taps: Tensor,
    starts: Tensor | None,
    row: int,
    head_dim: int,
    grad_y: Tensor,
) -> Tensor:
    """The gradient of `taps`, [3, D, 4] float32; that of y goes to grad_y's first 3 D columns.

    Args:
        grads: of the three outputs, [M, D] each, contiguous.
        grad_y: [M, N], its columns contiguous.
    """
    M, D = y.shape[0], taps.shape[1]
    blocks = ceil_div(M, STEPS - WIDTH + 1)
    partial = y.new_empty(blocks, 3, D, WIDTH, dtype=torch.float32)
    if M:
        with torch.cuda.device_of(y):
            _convolve_columns_backward[(blocks, D // head_dim, 3)](
                *grads,
                y,
                taps,
                starts,
                grad_y,
                partial,
                M,
                row,
                D,
                y.stride(0),
                grad_y.stride(0),
                EPS=L2NORM_EPS,
                K=head_dim,
                STEPS=STEPS,
                CHANNELS=power_of_two(head_dim),
                num_warps=1,
            )
    return partial.sum(dim=0)


@jit
def _first_of_sequence(starts, token, inside, row):
    """Of each token the first one of its sequence."""
    if starts is not None:
        return tl.load(starts + token, mask=inside, other=0)
    return token // row * row


@jit
def _row(x, token, num_tokens, stride, channel, K):
    """A head's channels of a token in float32; zeros where there is no such token."""
    width = tl.where((token >= 0) & (token < num_tokens), K, 0)
    place = x + token.to(tl.int64) * stride + channel
    return tl.load(place, mask=channel < width, other=0.0).to(tl.float32)


@launch_directly
@jit(counts=("num_tokens",))
def _convolve_columns(
    y,
    taps,
    starts,
    out0,
    out1,
    out2,
    num_tokens,
    row,
    D,
    y_stride,
    EPS: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    which = tl.program_id(2)
    if which == 0:
        out = out0
    elif which == 1:
        out = out1
    else:
        out = out2
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    own = tl.arange(0, CHANNELS)[None, :]
    channel = tl.program_id(1) * K + own
    inside = (token < num_tokens) & (own < K)
    start = _first_of_sequence(starts, token, token < num_tokens, row)
    column = which * D + channel
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for tap in tl.static_range(4):
        source = token + (tap - 3)
        factor = tl.load(taps + column * 4 + tap, mask=own < K, other=0.0)
        value = tl.load(
            y + source.to(tl.int64) * y_stride + column,
            mask=inside & (source >= start),
            other=0.0,
        )
        total += factor.to(tl.float32) * value.to(tl.float32)
    total = total * tl.sigmoid(total)
    if which < 2:
        total *= tl.rsqrt(tl.sum(total * total, axis=1) + EPS)[:, None]
    place = token.to(tl.int64) * D + channel
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@launch_directly
@jit(counts=("num_tokens",))
def _convolve_columns_backward(
    grad0,
    grad1,
    grad2,
    y,
    taps,
    starts,
    grad_y,
    partial,
    num_tokens,
    row,
    D,
    y_stride,
    grad_stride,
    EPS: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    which = tl.program_id(2)
    if which == 0:
        grad = grad0
    elif which == 1:
        grad = grad1
    else:
        grad = grad2
    first = tl.program_id(0) * (STEPS - 3)
    channel = tl.arange(0, CHANNELS)
    inside = channel < K
    head = tl.program_id(1) * K
    grad += head
    y += which * D + head
    grad_y += which * D + head
    tap = taps + (which * D + head + channel) * 4
    w0 = tl.load(tap, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(tap + 1, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(tap + 2, mask=inside, other=0.0).to(tl.float32)
    w3 = tl.load(tap + 3, mask=inside, other=0.0).to(tl.float32)
    dw0 = tl.zeros((CHANNELS,), dtype=tl.float32)
    dw1, dw2, dw3 = dw0, dw0, dw0
    dz1, dz2, dz3 = dw0, dw0, dw0  # of the last three tokens' sums before SiLU
    y3 = _row(y, first - 3, num_tokens, y_stride, channel, K)
    y2 = _row(y, first - 2, num_tokens, y_stride, channel, K)
    y1 = _row(y, first - 1, num_tokens, y_stride, channel, K)
    start1 = first
    start2 = first
    for outer in range(0, STEPS // 4):
        for inner in tl.static_range(4):  # four loads at once
            token = first + outer * 4 + inner
            start = _first_of_sequence(starts, token, token < num_tokens, row)
            y0 = _row(y, token, num_tokens, y_stride, channel, K)
            own = _row(grad, token, num_tokens, D, channel, K)
            before1 = tl.where(token - 1 >= start, y1, 0.0)
            before2 = tl.where(token - 2 >= start, y2, 0.0)
            before3 = tl.where(token - 3 >= start, y3, 0.0)
            z = w0 * before3 + w1 * before2 + w2 * before1 + w3 * y0
            sigmoid = tl.sigmoid(z)
            if which < 2:
                silu = z * sigmoid
                scale = tl.rsqrt(tl.sum(silu * silu) + EPS)
                along = tl.sum(own * silu) * scale * scale
                own = scale * (own - along * silu)
            dz = own * sigmoid * (1 + z * (1 - sigmoid))
            counted = tl.where(token < first + STEPS - 3, dz, 0.0)
            dw0 += counted * before3
            dw1 += counted * before2
            dw2 += counted * before1
            dw3 += counted * y0
            # all that the token three back has a part in is known now
            done = token - 3
            dy = w3 * dz3 + tl.where(start2 <= done, w2 * dz2, 0.0)
            dy += tl.where(start1 <= done, w1 * dz1, 0.0)
            dy += tl.where(start <= done, w0 * dz, 0.0)
            place = grad_y + done.to(tl.int64) * grad_stride + channel
            width = tl.where((done >= first) & (done < num_tokens), K, 0)
            tl.store(place, dy.to(grad_y.dtype.element_ty), mask=channel < width)
            y3, y2, y1 = y2, y1, y0
            dz3, dz2, dz1 = dz2, dz1, dz
            start2, start1 = start1, start
    place = (tl.program_id(0).to(tl.int64) * 3 + which) * D + head + channel
    place = partial + place * 4
    tl.store(place, dw0, mask=inside)
    tl.store(place + 1, dw1, mask=inside)
    tl.store(place + 2, dw2, mask=inside)
    tl.store(place + 3, dw3, mask=inside)
