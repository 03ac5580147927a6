"""Triton kernel of the three short convolutions of a KDA layer, where no graph is recorded.

`short_convolution` three times (its torch path is the reference) in one launch, which writes the
state after the last token on the way: at 4,096 tokens the launches of a layer take longer than its
arithmetic.

Shapes: B batch, T tokens, D channels, W taps.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, jit, tl

TOKENS, CHANNELS = 32, 128  # of a program


def convolve_three(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """SiLU of three causal depthwise convolutions, each over its own input.

    Args:
        inputs: three [B, T, D].
        weights: three [D, 1, W], oldest tap first.
        state: the W - 1 inputs before the first token, [B, 3, D, W - 1]; None for zeros.

    Returns:
        three outputs [B, T, D]; the state after the last token, [B, 3, D, W - 1].
    """
    B, T, D = inputs[0].shape
    W = weights[0].shape[-1]
    inputs, weights = [x.contiguous() for x in inputs], [x.contiguous() for x in weights]
    outputs = [torch.empty_like(x) for x in inputs]
    after = inputs[0].new_empty(B, 3, D, W - 1)
    grid = (ceil_div(T, TOKENS), ceil_div(D, CHANNELS), 3 * B)
    with torch.cuda.device_of(inputs[0]):
        _convolve[grid](
            *inputs,
            *weights,
            *outputs,
            state if state is None else state.contiguous(),
            after,
            T,
            D,
            W=W,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
        )
    return outputs, after


@jit
def _last_input(x, state, token, channel, D, W: tl.constexpr):
    """The input at a token that may lie before the first one: in the state, or zeros."""
    inside = channel < D
    value = tl.load(x + token.to(tl.int64) * D + channel, mask=inside & (token >= 0), other=0.0)
    if state is not None:
        place = state + channel * (W - 1) + token + W - 1
        value += tl.load(place, mask=inside & (token < 0), other=0.0)
    return value


@launch_directly
@jit
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
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    which = row % 3
    if which == 0:
        x, weight, out = x0, weight0, out0
    elif which == 1:
        x, weight, out = x1, weight1, out1
    else:
        x, weight, out = x2, weight2, out2
    first = tl.program_id(0) * TOKENS
    x += row // 3 * T * D
    out += row // 3 * T * D
    if state is not None:
        state += row * D * (W - 1)
    token = first + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (token < T) & (channel < D)
    own = tl.arange(0, TOKENS)[:, None] * D + channel  # from the program's first token
    start = first.to(tl.int64) * D
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for tap in tl.static_range(W):
        factor = tl.load(weight + channel * W + tap, mask=channel < D, other=0.0)
        source = token + (tap - W + 1)
        value = tl.load(x + start + own + (tap - W + 1) * D, mask=inside & (source >= 0), other=0.0)
        total += factor.to(tl.float32) * value.to(tl.float32)
        if first == 0:
            if state is not None:
                before = state + channel * (W - 1) + token + tap
                old = tl.load(before, mask=inside & (source < 0), other=0.0)
                total += factor.to(tl.float32) * old.to(tl.float32)
    total = total * tl.sigmoid(total)
    tl.store(out + start + own, total.to(out.dtype.element_ty), mask=inside)
    if first == 0:
        for column in tl.static_range(W - 1):
            place = row * D * (W - 1) + channel * (W - 1) + column
            offset = tl.full((1, CHANNELS), column - W + 1, dtype=tl.int32)
            last = _last_input(x, state, T + offset, channel, D, W)
            tl.store(after + place, last, mask=channel < D)
