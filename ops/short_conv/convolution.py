"""Short convolution: depthwise, causal, a few taps wide, with a state that continues sequences.

Technical report (arXiv 2510.26692), section 3: q, k, v pass a convolution of 4 taps and SiLU.

    y_t = act(sum_j weight[:, j] * x_{t - (W - 1) + j})

The state is the last W - 1 inputs, oldest first, [N, D, W - 1] in x's dtype: on both backends.

Shapes: B batch, T tokens, D channels, W taps, N sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.fla.backend import convolution_kernels, fla_layout, resolve_backend
from kimi_linear.ops.runtime import compute_dtype, needs_grad, no_autocast


def _packed_places(cu_seqlens: Tensor, num_tokens: int, history: int) -> tuple[Tensor, Tensor]:
    """Where everything goes when each packed sequence gets `history` places in front of it.

    Returns:
        starts [N], the first place of each sequence's history, and tokens [T], each token's place.
    """
    ends = cu_seqlens.to(torch.int64)
    starts = ends[:-1] + history * torch.arange(ends.numel() - 1, device=ends.device)
    token = torch.arange(num_tokens, device=ends.device)
    sequence = torch.searchsorted(ends[1:], token, right=True)
    return starts, token + history * (sequence + 1)


def _with_history(
    x: Tensor, initial_state: Tensor | None, history: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Put the state, or zeros, in front of every sequence.

    Returns:
        the extended inputs [B, T', D]; the places of the tokens' windows in it, [T], or None where
        they simply are the first T; and the new state [N, D, history], a copy.
    """
    B, T, D = x.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        past = x.new_zeros(N, history, D)
    else:
        past = initial_state.to(x.dtype).transpose(1, 2)
    if cu_seqlens is None:
        extended = torch.cat((past, x), dim=1)
        state = extended[:, T:].transpose(1, 2)
        return extended, None, state.clone(memory_format=torch.contiguous_format)
    starts, tokens = _packed_places(cu_seqlens, T, history)
    offsets = torch.arange(history, device=x.device)
    source = torch.empty(T + N * history, dtype=torch.int64, device=x.device)
    source[(starts[:, None] + offsets).flatten()] = torch.arange(N * history, device=x.device)
    source[tokens] = torch.arange(T, device=x.device) + N * history
    extended = torch.cat((past.reshape(N * history, D), x[0])).index_select(0, source)
    lengths = cu_seqlens.to(torch.int64).diff()
    last = (starts + lengths)[:, None] + offsets
    state = extended.index_select(0, last.flatten()).view(N, history, D).transpose(1, 2)
    return extended[None], tokens - history, state.contiguous()


def _torch_convolution(
    x: Tensor,
    weight_DW: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shifts and adds in [B, T, D]: twice as fast as a grouped F.conv1d on a CPU."""
    dtype = compute_dtype(x)
    weight_DW = weight_DW.to(dtype)
    if x.shape[1] > 1:  # each tap's channels lie together: products with it are vectors'
        weight_DW = weight_DW.t().contiguous().t()
    taps = weight_DW.unbind(1)
    extended, windows, state = _with_history(x, initial_state, len(taps) - 1, cu_seqlens)
    wide = extended.to(dtype)
    length = wide.shape[1] - len(taps) + 1
    y = wide[:, :length] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        y.addcmul_(wide[:, j : j + length], tap)
    if windows is not None:
        y = y.index_select(1, windows)
    return F.silu(y, inplace=not torch.is_grad_enabled()).to(x.dtype), state


def _fla_short_convolution(
    x: Tensor,
    weight_DW: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """FLA's kernels; their caches are W wide, the oldest column is never read."""
    causal_conv1d, causal_conv1d_update = convolution_kernels()
    weight_DW = weight_DW.contiguous()
    x = x.contiguous()
    state = None if initial_state is None else F.pad(initial_state.to(x.dtype), (1, 0))
    if (
        x.shape[1] == 1
        and state is not None
        and cu_seqlens is None
        and not needs_grad(x, weight_DW)
    ):
        y, state = causal_conv1d_update(x, state, weight=weight_DW, activation="silu")
        return y, (state[:, :, 1:].contiguous() if output_final_state else None)
    y, _ = causal_conv1d(
        x,
        weight_DW,
        initial_state=state,
        output_final_state=False,
        activation="silu",
        backend="triton",
        cu_seqlens=None if cu_seqlens is None else fla_layout(cu_seqlens).all_ends,
    )
    if not output_final_state:
        return y, None
    return y, convolution_state(x, initial_state, weight_DW.shape[1] - 1, cu_seqlens)


def convolution_state(
    x: Tensor, initial_state: Tensor | None, history: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The last `history` inputs of each sequence, without touching the others.

    Args:
        x: inputs [B, T, D].
        initial_state: those before them, [N, D, history]; None for zeros.
        history: W - 1.
        cu_seqlens: ends of packed sequences, with B = 1.

    Returns:
        [N, D, history], a copy.
    """
    B, T, D = x.shape
    if cu_seqlens is None:
        if history <= T:
            return x[:, T - history :].transpose(1, 2).contiguous()
        return _with_history(x, initial_state, history, None)[2]
    ends = cu_seqlens.to(torch.int64)
    lengths, offsets = ends.diff(), torch.arange(history, device=x.device)
    age = lengths[:, None] - history + offsets  # [N, history]: place in the sequence, < 0 is older
    state = x[0].index_select(0, (ends[:-1, None] + age).clamp(0, T - 1).flatten())
    state = state.view(-1, history, D).transpose(1, 2)
    older = age.lt(0)[:, None]
    if initial_state is None:
        return state.masked_fill(older, 0)
    place = (age + history).clamp(max=history - 1)[:, None].expand_as(state)
    return torch.where(older, initial_state.to(x.dtype).gather(2, place), state)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """SiLU of a causal depthwise convolution over each sequence, and the state to continue it with.

    Args:
        x: inputs [B, T, D].
        weight: taps [D, W] or [D, 1, W], oldest first.
        initial_state: last inputs before x, [N, D, W - 1], oldest first, or None for zeros; N is B,
            or the number of packed sequences. Gradients through it are computed in torch.
        output_final_state: return the new state too.
        cu_seqlens: int32 or int64 [N + 1], ends of packed sequences, with B = 1; empty ones are
            allowed and hand their state through.
        backend: "auto", "fla" or "torch", see `resolve_backend`.

    Returns:
        (y, state): y [B, T, D] and state [N, D, W - 1] or None, both in x's dtype; sums are
        in fp32, or float64 for float64.

    Raises:
        ValueError: for a weight or a state that does not fit, or a backend that cannot run.
    """
    weight_DW = weight.squeeze(1) if weight.dim() == 3 and weight.shape[1] == 1 else weight
    if weight_DW.dim() != 2 or weight_DW.shape[0] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [{x.shape[-1]}, W]")
    num_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    needed = (num_sequences, x.shape[-1], weight_DW.shape[1] - 1)
    if initial_state is not None and tuple(initial_state.shape) != needed:
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}; it must be {needed}")
    continues = initial_state is not None and needs_grad(x, weight, initial_state)
    if resolve_backend(x, backend) == "fla" and x.shape[1] > 0 and not continues:
        return _fla_short_convolution(x, weight_DW, initial_state, output_final_state, cu_seqlens)
    with no_autocast(x.device):
        y, state = _torch_convolution(x, weight_DW, initial_state, cu_seqlens)
    return y, (state if output_final_state else None)
