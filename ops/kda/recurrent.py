"""KDA token by token, the ground truth of every other path, and what all paths start from.

Shapes: B batch, T tokens, H heads, K key size, V value size, N sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.runtime import compute_dtype, no_autocast, spare

L2NORM_EPS = 1e-6


class KDAInputs(NamedTuple):
    """The arguments of `kda_attention` that carry data."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    is_normalised: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the flag."""
        return self[:-1]

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def checked(self) -> KDAInputs:
        """Itself; ValueError on the first argument whose shape does not fit."""
        if self.q.dim() != 4 or self.v.dim() != 4:
            raise ValueError(
                f"q and v have {self.q.dim()} and {self.v.dim()} axes; both must be [B, T, H, size]"
            )
        (B, T, H, K), V = self.q.shape, self.v.shape[-1]
        expected = {"k": (B, T, H, K), "v": (B, T, H, V), "g": (B, T, H, K), "beta": (B, T, H)}
        if self.cu_seqlens is not None:
            check_cu_seqlens(self.cu_seqlens, B, T)
        if self.initial_state is not None:
            expected["initial_state"] = (self.num_sequences, H, K, V)
        for name, shape in expected.items():
            given = tuple(getattr(self, name).shape)
            if given != shape:
                raise ValueError(f"{name} has shape {given}; with this q and v it must be {shape}")
        sizes = {"A_log": ("H", H), "dt_bias": ("H * K", H * K)}
        for name, (symbol, size) in sizes.items():
            count = getattr(self, name).numel()
            if count != size:
                raise ValueError(f"{name} has {count} elements; it must have {symbol} = {size}")
        return self


def check_cu_seqlens(cu_seqlens: Tensor, batch_size: int, num_tokens: int) -> None:
    """Raise ValueError unless cu_seqlens cuts one packed row; values are read on a CPU only."""
    if batch_size != 1:
        raise ValueError(f"the batch size is {batch_size}; with cu_seqlens it must be 1")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [N + 1], N >= 1"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}; it must be torch.int32 or torch.int64")
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != num_tokens or any(a > b for a, b in pairwise(ends)):
            raise ValueError(
                f"cu_seqlens is {ends[:8]}{'...' if len(ends) > 8 else ''}; "
                f"it must not decrease and must go from 0 to the number of tokens, {num_tokens}"
            )


def l2norm(x: Tensor, scale: Tensor | float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale * x / sqrt(sum(x^2) + 1e-6) over the last axis."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.mul(x, torch.rsqrt(norm * norm + L2NORM_EPS) * scale, out=out)


def log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay -exp(A_log) softplus(g + dt_bias), <= 0.

    KDA's decay is computed in three places. The torch paths, `recurrent_kda`, `step_in_place` and
    `chunked_kda`, call this function. FLA's kernels have their own copy, for training, prefill and
    steps on a GPU: `use_gate_in_kernel=True` in `ops/kda/fla.py` turns it on. The recorded decode
    step has another in `decode/attention_kernels.py`, where `decay = tl.exp(-A * softplus)`.

    Args:
        g: raw gate [..., H, K].
        A_log: H elements in any shape.
        dt_bias: [H * K].

    Returns:
        [..., H, K] in g's dtype; finite, with finite gradients, for every finite input.
    """
    num_heads, head_dim = g.shape[-2:]
    rate = A_log.to(g.dtype).reshape(num_heads, 1).exp()
    x = g + dt_bias.to(g.dtype).reshape(num_heads, head_dim)
    # Past the threshold softplus returns x: at the default, 20, that is wrong by 2e-9.
    softplus = F.softplus(x, threshold=40.0)
    return torch.mul(softplus, -rate, out=spare(softplus))


def recurrent_kda(x: KDAInputs, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """`kda_attention` by the report's recurrence. Twice differentiable."""
    dtype = compute_dtype(x.q)
    (B, T, H, K), V = x.q.shape, x.v.shape[-1]
    spans = [(slice(None), 0, T)]
    if x.cu_seqlens is not None:
        ends = x.cu_seqlens.tolist()
        spans = [(slice(n, n + 1), a, b) for n, (a, b) in enumerate(pairwise(ends))]
    outputs, states = [], []
    with no_autocast(x.q.device):
        q_BTHK, k_BTHK, v_BTHV, decay_BTHK, beta_BTH = _activated(x)
        for rows, start, end in spans:
            state_BHKV = q_BTHK.new_zeros(B, H, K, V)
            if x.initial_state is not None:
                state_BHKV = x.initial_state[rows].to(dtype)
            for t in range(start, end):
                state_BHKV = state_BHKV * decay_BTHK[:, t, :, :, None]
                error = v_BTHV[:, t] - torch.einsum("bhk,bhkv->bhv", k_BTHK[:, t], state_BHKV)
                update = beta_BTH[:, t, :, None] * error
                state_BHKV = state_BHKV + k_BTHK[:, t, :, :, None] * update[:, :, None, :]
                outputs.append(torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKV))
            states.append(state_BHKV)
    out = torch.stack(outputs, dim=1).to(x.v.dtype) if outputs else torch.zeros_like(x.v)
    return out, (torch.cat(states) if output_final_state else None)


def can_step_in_place(state_out: Tensor | None, x: KDAInputs) -> TypeGuard[Tensor]:
    """Whether `step_in_place` takes this token and writes its state to `state_out`."""
    if x.initial_state is None or state_out is None:
        return False
    return state_out.dtype == x.initial_state.dtype == compute_dtype(x.q)


def step_in_place(x: KDAInputs, state_BHKV: Tensor) -> Tensor:
    """The output for one token of every row, without a graph.

    `state_BHKV`, which may be the initial state itself, becomes the state after the token.
    """
    assert x.initial_state is not None
    with no_autocast(x.q.device):
        q, k, v, decay, beta = (tensor[:, 0] for tensor in _activated(x))
        torch.mul(x.initial_state, decay[..., None], out=state_BHKV)
        error = v - (k[:, :, None] @ state_BHKV)[:, :, 0]
        state_BHKV.addcmul_(k[..., None], (beta[..., None] * error)[:, :, None])
        return (q[:, :, None] @ state_BHKV).transpose(1, 2).to(x.v.dtype)


def _activated(x: KDAInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q and k normalised, q scaled; v; decay, and beta after its sigmoid; all wide."""
    dtype = compute_dtype(x.q)
    scaled = torch.mul if x.is_normalised else l2norm
    q_BTHK, k_BTHK = scaled(x.q.to(dtype), x.q.shape[-1] ** -0.5), scaled(x.k.to(dtype), 1.0)
    decay_BTHK = log_decay(x.g.to(dtype), x.A_log, x.dt_bias).exp()
    return q_BTHK, k_BTHK, x.v.to(dtype), decay_BTHK, x.beta.to(dtype).sigmoid()
