"""Kimi Delta Attention (KDA): the recurrence, its chunked form in torch, FLA's kernels, one entry.

Technical report (arXiv 2510.26692), section 3. Per head, with alpha_t = exp(g_t) in (0, 1]^K:

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        S in R^{K x V}
    o_t = S_t^T q_t

Everything here takes raw inputs, as they leave the short convolutions and the gate projections,
and does the L2 norm of q and k (eps 1e-6 inside the root), the scale K^-1/2 on q, the log decay
g = -exp(A_log) softplus(g_raw + dt_bias) and beta = sigmoid(beta_raw) itself.

`kda_attention` is the entry; `recurrent_kda` is the ground truth; `chunked_kda` is the torch path.

Shapes: B batch, T tokens, H heads, K key size, V value size, N sequences, C chunk, L tokens of a
segment, R sequences of a segment, G = chunks x sequences x heads of a segment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import torch
import torch.nn.functional as F
from kimi_linear.ops.fla.tuning import use_known_configs
from kimi_linear.ops.runtime import (
    compute_dtype,
    is_exporting,
    is_transformed,
    needs_grad,
    no_autocast,
    power_of_two,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

Backend = Literal["auto", "fla", "torch"]

L2NORM_EPS = 1e-6
CHUNK_SIZE = 64
# Elements of one [R, L, H, K] tensor: it fits a CPU's caches and is large enough to hide dispatch.
SEGMENT_ELEMENTS = 1 << 19
FLA_DEVICES = ("cuda", "xpu", "npu")
FLA_HEAD_DIMS = (16, 256)
# Up to so many tokens FLA's recurrence, one launch, is faster than its chunked form, nine.
RECURRENT_TOKENS = 64


# ------------------------------------------------------------------------------------------ backend
@functools.cache
def _fla_kernels() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None, str]:
    """(chunk_kda, fused_recurrent_kda, "") or (None, None, why not)."""
    try:
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
    except (ImportError, RuntimeError, AttributeError) as error:  # absent, or a broken triton
        return None, None, f"{type(error).__name__}: {error}"
    use_known_configs()
    return chunk_kda, fused_recurrent_kda, ""


def _fla_obstacle(tensor: Tensor, head_dims: Sequence[int]) -> str:
    """Why FLA cannot take this tensor, or ""."""
    if is_transformed():
        return "a transform of torch.func is at work"
    if tensor.device.type not in FLA_DEVICES:
        return f"the tensor is on {tensor.device.type!r}, FLA needs one of {FLA_DEVICES}"
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FLA has no kernels for {tensor.dtype}"
    low, high = FLA_HEAD_DIMS
    if any(not low <= size <= high for size in head_dims):
        return f"head sizes are {tuple(head_dims)}, FLA takes {low} to {high}"
    reason = _fla_kernels()[2]
    return f"fla cannot be imported ({reason})" if reason else ""


def resolve_backend(
    tensor: Tensor, backend: str = "auto", *, head_dims: Sequence[int] = ()
) -> Literal["fla", "torch"]:
    """Choose the implementation by the tensor's device and dtype and by what is installed.

    Args:
        tensor: the tensor to compute on.
        backend: "auto" (FLA where it can run, else torch), "fla" or "torch".
        head_dims: key and value sizes to check against FLA's limits.

    Returns:
        "fla" or "torch".

    Raises:
        ValueError: for an unknown name, or for "fla" where FLA cannot run; the message says why.
    """
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend is {backend!r}; allowed are {', '.join(map(repr, get_args(Backend)))}"
        )
    if backend == "torch":
        return "torch"
    obstacle = _fla_obstacle(tensor, head_dims)
    if backend == "fla" and obstacle:
        raise ValueError(f"backend is 'fla', but {obstacle}; allowed here are 'auto' and 'torch'")
    return "torch" if obstacle else "fla"


# -------------------------------------------------------------------------------------- mathematics
def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.rsqrt(norm * norm + L2NORM_EPS)


def log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay -exp(A_log) softplus(g + dt_bias), <= 0.

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
    return -rate * F.softplus(x, threshold=40.0)


class _Inputs(NamedTuple):
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

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def checked(self) -> _Inputs:
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
            if tuple(getattr(self, name).shape) != shape:
                given = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} has shape {given}; with this q and v it must be {shape}")
        if self.A_log.numel() != H:
            raise ValueError(f"A_log has {self.A_log.numel()} elements; it must have H = {H}")
        if self.dt_bias.numel() != H * K:
            raise ValueError(
                f"dt_bias has {self.dt_bias.numel()} elements; it must have H * K = {H * K}"
            )
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


# --------------------------------------------------------------------------------------- recurrence
def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, token by token: the ground truth of every other path. Twice differentiable.

    Args, Returns and Raises are those of `kda_attention`.
    """
    inputs = _Inputs(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens).checked()
    with no_autocast(q.device):
        return _recurrent(inputs, output_final_state)


def _activated(x: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q and k normalised, q scaled; v; decay, and beta after its sigmoid; all wide."""
    dtype = compute_dtype(x.q)
    q_BTHK = l2norm(x.q.to(dtype)) * x.q.shape[-1] ** -0.5
    decay_BTHK = log_decay(x.g.to(dtype), x.A_log, x.dt_bias).exp()
    return q_BTHK, l2norm(x.k.to(dtype)), x.v.to(dtype), decay_BTHK, x.beta.to(dtype).sigmoid()


def _step_in_place(x: _Inputs, state_BHKV: Tensor) -> Tensor:
    """One token of every row; the state after it is written to `state_BHKV`. No graph."""
    assert x.initial_state is not None
    q, k, v, decay, beta = (tensor[:, 0] for tensor in _activated(x))
    torch.mul(x.initial_state, decay[..., None], out=state_BHKV)
    error = v - (k[:, :, None] @ state_BHKV)[:, :, 0]
    state_BHKV.addcmul_(k[..., None], (beta[..., None] * error)[:, :, None])
    return (q[:, :, None] @ state_BHKV).transpose(1, 2).to(x.v.dtype)


def _recurrent(x: _Inputs, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(x.q)
    (B, T, H, K), V = x.q.shape, x.v.shape[-1]
    q_BTHK, k_BTHK, v_BTHV, decay_BTHK, beta_BTH = _activated(x)
    spans = [(slice(None), 0, T)]
    if x.cu_seqlens is not None:
        ends = x.cu_seqlens.tolist()
        spans = [(slice(n, n + 1), a, b) for n, (a, b) in enumerate(pairwise(ends))]
    outputs, states = [], []
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


# ----------------------------------------------------------------------------- chunked form: layout
class _Segment(NamedTuple):
    """Tokens of some sequences, computed together: num_chunks chunks of chunk_size per sequence."""

    rows: slice | Tensor  # sequences: slice, or int64 [R]
    tokens: slice | Tensor  # slice of the token axis, or int64 [R, L] into a packed row
    valid: Tensor | None  # bool [R or 1, L]; False is padding
    chunk_size: int
    num_chunks: int
    is_first: bool  # all its sequences start here
    is_last: bool  # all its sequences end here


def _plan_batch(B: int, T: int, max_tokens: int, device: torch.device) -> list[_Segment]:
    """Segments of B sequences of T tokens: whole chunks first, then one padded remainder. For an
    exported program, whose sizes are symbols, all in one."""
    if is_exporting():
        count = -(-T // CHUNK_SIZE)
        real = torch.arange(count * CHUNK_SIZE, device=device) < T
        tokens = slice(0, T)
        return [_Segment(slice(0, B), tokens, real[None], CHUNK_SIZE, count, True, True)]
    segments = []
    whole = T - T % CHUNK_SIZE
    row_step = max(1, max_tokens // min(T, CHUNK_SIZE))
    for row in range(0, B, row_step):
        rows = slice(row, min(B, row + row_step))
        step = max(CHUNK_SIZE, max_tokens // (rows.stop - row) // CHUNK_SIZE * CHUNK_SIZE)
        for start in range(0, whole, step):
            end = min(whole, start + step)
            count = (end - start) // CHUNK_SIZE
            tokens = slice(start, end)
            segments.append(_Segment(rows, tokens, None, CHUNK_SIZE, count, start == 0, end == T))
        if whole < T:
            size = power_of_two(T - whole)
            valid = None
            if size != T - whole:
                valid = (torch.arange(size, device=device) < T - whole)[None]
            segments.append(_Segment(rows, slice(whole, T), valid, size, 1, whole == 0, True))
    return segments


def _plan_packed(ends: list[int], max_tokens: int, device: torch.device) -> list[_Segment]:
    """Segments of packed sequences.

    Whole chunks run over all sequences that still have some; remainders run together by size, so
    that padding never doubles the work, whatever the mix of lengths.
    """
    starts, stops = torch.tensor(ends[:-1]), torch.tensor(ends[1:])
    whole, rest = (stops - starts) // CHUNK_SIZE, (stops - starts) % CHUNK_SIZE
    segments: list[_Segment] = []

    def add(rows: Tensor, begin: Tensor, size: int, count: int) -> None:
        for row in rows.split(max(1, max_tokens // (size * count))):
            tokens = begin[row, None] + torch.arange(size * count)
            real = tokens < stops[row, None]
            valid = None if bool(real.all()) else real.to(device)
            is_first = bool((begin == starts)[row].all())
            is_last = bool((tokens[:, -1] + 1 >= stops[row]).all())
            tokens = tokens.clamp(max=ends[-1] - 1).to(device)
            segments.append(_Segment(row.to(device), tokens, valid, size, count, is_first, is_last))

    done = 0
    for level in sorted(set(whole.tolist()) - {0}):
        rows = (whole >= level).nonzero().flatten()
        while done < level:
            count = min(level - done, max(1, max_tokens // (CHUNK_SIZE * len(rows))))
            add(rows, starts + done * CHUNK_SIZE, CHUNK_SIZE, count)
            done += count
    size = 1
    while size <= CHUNK_SIZE:
        rows = ((rest > size // 2) & (rest <= size)).nonzero().flatten()
        add(rows, starts + whole * CHUNK_SIZE, size, 1)
        size *= 2
    return segments


def _pick(x: Tensor, segment: _Segment) -> Tensor:
    """The segment's tokens of x [B, T, ...] as [R, L, ...]; padding is zero."""
    if isinstance(segment.tokens, slice):
        x = x[segment.rows, segment.tokens]
        missing = segment.chunk_size * segment.num_chunks - x.shape[1]
        if isinstance(missing, int) and missing == 0:
            return x
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x[0].index_select(0, segment.tokens.flatten()).unflatten(0, segment.tokens.shape)
    if segment.valid is not None:
        x = x.masked_fill(~segment.valid.view(segment.valid.shape + (1,) * (x.dim() - 2)), 0)
    return x


def _put(out: Tensor, segment: _Segment, x: Tensor) -> None:
    """Write x [R, L, ...] to the segment's places of out [B, T, ...], leaving padding out."""
    if isinstance(segment.tokens, slice):
        target = out[segment.rows, segment.tokens]
        target.copy_(x[:, : target.shape[1]])
    elif segment.valid is None:
        out[0, segment.tokens.flatten()] = x.flatten(0, 1).to(out.dtype)
    else:
        out[0, segment.tokens[segment.valid]] = x[segment.valid].to(out.dtype)


# ------------------------------------------------------------------------ chunked form: mathematics
def _by_chunk(x_RLH: Tensor, segment: _Segment) -> Tensor:
    """[R, L, H, ...] -> view [chunks, R, H, C, ...]."""
    x = x_RLH.unflatten(1, (segment.num_chunks, segment.chunk_size))
    return x.permute(1, 0, 3, 2, *range(4, x.dim()))


def _pair_blocks(
    qk_GC2K: Tensor, decay_GCK: Tensor, tape: list[tuple[Tensor, Tensor, Tensor]] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of `_IntraChunk`; the tape takes each level's factors and decays."""
    G, C, _, K = qk_GC2K.shape
    scores = qk_GC2K.new_zeros(G, C, 2, C)
    columns = qk_GC2K[:, :, 1].clone()
    diagonal = (qk_GC2K[:, :, 0] * columns).sum(-1)
    scores[:, :, 0].diagonal(dim1=1, dim2=2).copy_(diagonal)
    rows = qk_GC2K * decay_GCK[:, :, None]
    total = decay_GCK
    size = 1
    while size < C:
        m = C // (2 * size)
        rows_second = rows.view(G * m, 4 * size, K)[:, 2 * size :]
        columns_first = columns.view(G * m, 2 * size, K)[:, :size]
        block = rows_second @ columns_first.transpose(1, 2)
        _corner_blocks(scores, size).copy_(block.view(G, m, size, 2, size).permute(0, 2, 3, 4, 1))
        total = total.reshape(G * m, 2, K)
        if tape is not None:
            tape.append((rows_second.clone(), columns_first.clone(), total))
        rows_second.mul_(total[:, :1])
        columns_first.mul_(total[:, 1:])
        total = total[:, 0] * total[:, 1]
        size *= 2
    return scores, rows, columns, total.reshape(G, K)


def _corner_blocks(scores_GC2C: Tensor, size: int) -> Tensor:
    """View [G, size, 2, size, m]: rows of the second, columns of the first block of every pair."""
    G, C = scores_GC2C.shape[:2]
    m = C // (2 * size)
    blocks = scores_GC2C.view(G, m, 2 * size, 2, m, 2 * size).diagonal(dim1=1, dim2=4)
    return blocks[:, size:, :, :size]


class _IntraChunk(torch.autograd.Function):
    """Decayed products within a chunk, by doubling: pairs of blocks of 1, 2, 4, ... 32 tokens.

    A row of the second block meets a column of the first through the end of the first block: the
    row carries the decay from there to itself, the column the decay from itself to there. Both are
    products of numbers in [0, 1]: nothing overflows, nothing cancels, and what underflows is zero
    in the result too. Every pairing is one batch of matrix products; at the end the rows carry the
    decay from the chunk's start, the columns that to its end.

    Inputs: qk [G, C, 2, K] (normalised q, scaled, and k), decay [G, C, K] (exp of the log decay).
    Outputs: scores [G, C, 2, C] (q rows with the diagonal, k rows without; zero above), rows
    [G, C, 2, K], columns [G, C, K] and the whole chunk's decay [G, K].
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tape: list[tuple[Tensor, Tensor, Tensor]] = []
        outputs = _pair_blocks(qk, decay, tape)
        ctx.save_for_backward(qk, decay, *(tensor for level in tape for tensor in level))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_scores: Tensor, d_rows: Tensor, d_columns: Tensor, d_total: Tensor
    ) -> tuple[Tensor, Tensor]:
        qk, decay, *tape = ctx.saved_tensors
        G, C, _, K = qk.shape
        d_scores = d_scores.contiguous()
        d_rows, d_columns = (
            x.clone(memory_format=torch.contiguous_format) for x in (d_rows, d_columns)
        )
        size = C // 2
        while size:
            m = C // (2 * size)
            rows_second, columns_first, total = tape[-3:]
            del tape[-3:]
            d_second = d_rows.view(G * m, 4 * size, K)[:, 2 * size :]
            d_first = d_columns.view(G * m, 2 * size, K)[:, :size]
            d_decays = d_total.reshape(G * m, 1, K) * total.flip(1)
            d_decays[:, 0] += (d_second * rows_second).sum(1)
            d_decays[:, 1] += (d_first * columns_first).sum(1)
            d_second.mul_(total[:, :1])
            d_first.mul_(total[:, 1:])
            d_block = _corner_blocks(d_scores, size).permute(0, 4, 1, 2, 3)
            d_block = d_block.reshape(G * m, 2 * size, size)
            d_second.add_(d_block @ columns_first)
            d_first.add_(d_block.transpose(1, 2) @ rows_second)
            d_total = d_decays
            size //= 2
        d_decay = d_total.reshape(G, C, K) + (d_rows * qk).sum(2)
        d_diagonal = d_scores[:, :, 0].diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_qk = d_rows.mul_(decay[:, :, None])
        d_qk[:, :, 0].addcmul_(d_diagonal, qk[:, :, 1])
        d_qk[:, :, 1].add_(d_columns).addcmul_(d_diagonal, qk[:, :, 0])
        return d_qk, d_decay


def _intra_chunk(qk_GC2K: Tensor, decay_GCK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_IntraChunk`, without its tape where no gradients are recorded."""
    if torch.is_grad_enabled():
        return _IntraChunk.apply(qk_GC2K, decay_GCK)
    return _pair_blocks(qk_GC2K, decay_GCK, None)


def _run_segment(
    inputs: Sequence[Tensor], state: Tensor | None, segment: _Segment, want_state: bool
) -> tuple[Tensor, Tensor | None]:
    """q, k, v, g, beta [R, L, H, ...], A_log, dt_bias; state [R, H, K, V] or None for zero."""
    q, k, v, g, beta, A_log, dt_bias = inputs
    dtype = compute_dtype(q)
    (R, L, H, K), V = q.shape, v.shape[-1]
    n, C = segment.num_chunks, segment.chunk_size

    qk = torch.stack((_by_chunk(q, segment), _by_chunk(k, segment)), dim=-2).to(dtype)
    scale = qk.new_tensor((K**-0.5, 1.0))[:, None]
    qk = (l2norm(qk) * scale).view(n * R * H, C, 2, K)
    gate = log_decay(g.to(dtype), A_log, dt_bias)
    if segment.valid is not None:
        gate = gate.masked_fill(~segment.valid[:, :, None, None], 0)
    decay = _by_chunk(gate, segment).reshape(n * R * H, C, K).exp()
    beta_GC = _by_chunk(beta.to(dtype), segment).reshape(n * R * H, C).sigmoid()
    v_nGCV = _by_chunk(v.to(dtype), segment).reshape(n, R * H, C, V)

    scores, rows, columns, total = _intra_chunk(qk, decay)
    # v_new = (I + Diag(beta) A)^-1 Diag(beta) (v - rows_k S) makes a chunk's updates independent.
    solved = torch.linalg.solve_triangular(
        beta_GC[:, :, None] * scores[:, :, 1], beta_GC.diag_embed(), upper=False, unitriangular=True
    )
    S = None if state is None else state.reshape(R * H, K, V)
    chunks = zip(
        rows.view(n, R * H, 2 * C, K).unbind(),  # one gradient, where n slices would fill n
        scores[:, :, 0].view(n, R * H, C, C).unbind(),
        columns.view(n, R * H, C, K).transpose(2, 3).unbind(),
        total.view(n, R * H, K, 1).unbind(),
        solved.view(n, R * H, C, C).unbind(),
        v_nGCV.unbind(),
        strict=True,
    )
    outputs: list[Tensor] = []
    for row, score, column, decay, solve, value in chunks:
        if S is None:
            v_new = solve @ value
            outputs.append(score @ v_new)
        else:
            from_q, from_k = (row @ S).view(R * H, C, 2, V).unbind(2)
            v_new = solve @ (value - from_k)
            outputs.append(torch.baddbmm(from_q, score, v_new))
        if len(outputs) < n or want_state:
            S = column @ v_new if S is None else torch.baddbmm(S * decay, column, v_new)
    out = torch.stack(outputs).view(n, R, H, C, V).permute(1, 0, 3, 2, 4).reshape(R, L, H, V)
    return out, (S.view(R, H, K, V) if want_state and S is not None else None)


class _ChunkedKDA(torch.autograd.Function):
    """Segments without a graph; backward recomputes one at a time, so that memory stays bounded."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        segments: list[_Segment],
        num_sequences: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = compute_dtype(q)
        keep = any(ctx.needs_input_grad)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        states: Tensor | None = None
        if initial_state is not None:
            states = initial_state.to(dtype, copy=True)
        elif output_final_state or not all(s.is_last for s in segments):
            states = q.new_zeros(num_sequences, *q.shape[2:], v.shape[-1], dtype=dtype)
        saved: list[Tensor | None] = []
        for segment in segments:
            state = None
            if states is not None and not (initial_state is None and segment.is_first):
                state = states[segment.rows]
                if keep and isinstance(segment.rows, slice):
                    state = state.clone()
            raw = [_pick(x, segment) for x in (q, k, v, g, beta)]
            want = output_final_state or not segment.is_last
            with no_autocast(q.device):
                piece, state_out = _run_segment((*raw, A_log, dt_bias), state, segment, want)
            _put(out, segment, piece)
            if states is not None and state_out is not None:
                states[segment.rows] = state_out
            saved.append(state if keep else None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, *saved)
        ctx.segments, ctx.output_final_state = segments, output_final_state
        ctx.state_shape = (num_sequences, *q.shape[2:], v.shape[-1])
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return out, (states if output_final_state else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # read once: checkpointing recomputes them
        inputs, saved = tensors[:7], tensors[7:]
        dtype = compute_dtype(inputs[0])
        grads = [torch.zeros_like(x) for x in inputs]
        grad_states: Tensor | None = None
        if grad_final is not None:
            grad_states = grad_final.to(dtype, copy=True)
        elif ctx.state_dtype is not None or any(state is not None for state in saved):
            grad_states = inputs[0].new_zeros(ctx.state_shape, dtype=dtype)
        for segment, state in zip(reversed(ctx.segments), reversed(saved), strict=True):
            want = grad_states is not None and (ctx.output_final_state or not segment.is_last)
            grad_pieces = (
                None if grad_out is None else _pick(grad_out, segment),
                grad_states[segment.rows] if want and grad_states is not None else None,
            )
            *pieces, grad_A, grad_dt, grad_state = _segment_grads(
                inputs, state, segment, grad_pieces
            )
            for grad, piece in zip(grads[:5], pieces, strict=True):
                if piece is not None:
                    _put(grad, segment, piece)
            for grad, piece in zip(grads[5:], (grad_A, grad_dt), strict=True):
                if piece is not None:
                    grad += piece
            if grad_states is not None:
                grad_states[segment.rows] = 0 if grad_state is None else grad_state
        grad_initial = None
        if grad_states is not None and ctx.state_dtype is not None:
            grad_initial = grad_states.to(ctx.state_dtype)
        return *grads, grad_initial, None, None, None


def _segment_grads(
    inputs: Sequence[Tensor],
    state: Tensor | None,
    segment: _Segment,
    grad_pieces: tuple[Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """Recompute a segment: gradients by its seven inputs and its state (None for no state)."""
    leaves = [_pick(x, segment) for x in inputs[:5]] + list(inputs[5:])
    leaves = [x.detach().requires_grad_() for x in leaves]
    wanted = leaves
    if state is not None:
        state = state.detach().requires_grad_()
        wanted = [*leaves, state]
    grad_out, grad_state = grad_pieces
    with no_autocast(leaves[0].device):
        with torch.enable_grad():
            out, state_out = _run_segment(leaves, state, segment, grad_state is not None)
        roots, grads = [], []
        if grad_out is not None:
            roots, grads = [out], [grad_out.to(out.dtype)]
        if state_out is not None and grad_state is not None:
            roots.append(state_out)
            grads.append(grad_state)
        if not roots:
            return [None] * 8
        found = torch.autograd.grad(roots, wanted, grads, allow_unused=True)
    return [*found, None][:8]


def chunked_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """KDA as matrix products over chunks (the report's equations 5 to 9), on any device.

    Memory beyond inputs and outputs is that of one segment (2^19 elements per tensor) and, where
    gradients are needed, one state per segment. Differentiable once, also through both states.

    Args, Returns and Raises are those of `kda_attention`.
    """
    inputs = _Inputs(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens).checked()
    B, T, H, K = q.shape
    max_tokens = max(CHUNK_SIZE, SEGMENT_ELEMENTS // (H * max(K, v.shape[-1])))
    if T == 0:
        segments = []
    elif cu_seqlens is None:
        segments = _plan_batch(B, T, max_tokens, q.device)
    else:
        segments = _plan_packed(cu_seqlens.tolist(), max_tokens, q.device)
    return _ChunkedKDA.apply(*inputs[:8], output_final_state, segments, inputs.num_sequences)


# ---------------------------------------------------------------------------------------------- FLA
class FlaLayout(NamedTuple):
    """A packed layout as FLA takes it."""

    version: int | None  # of the tensor it was made from; None cannot be checked
    all_ends: Tensor  # int64 [N + 1], a tensor of its own
    filled_ends: Tensor  # the same without empty sequences
    filled: Tensor | None  # int64, the sequences that are not empty; None means all


_layouts: MutableMapping[Tensor, FlaLayout] = WeakIdKeyDictionary()


def fla_layout(cu_seqlens: Tensor) -> FlaLayout:
    """FLA's form of cu_seqlens, made once per tensor and again when the tensor was written to.

    FLA keeps what it derives from cu_seqlens by the identity of the tensor, so a buffer refreshed
    in place would give stale chunks: every content gets a tensor of its own. (A write that torch
    does not count, such as one inside a replayed CUDA graph, cannot be seen.) Making it reads the
    lengths on the host.
    """
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    layout = _layouts.get(cu_seqlens)
    if layout is not None and version is not None and layout.version == version:
        return layout
    all_ends = cu_seqlens.to(torch.int64, copy=True)
    is_filled = all_ends.diff() > 0
    layout = FlaLayout(version, all_ends, all_ends, None)
    if not bool(is_filled.all()):
        filled_ends = torch.cat((all_ends[:1], all_ends[1:][is_filled]))
        layout = FlaLayout(version, all_ends, filled_ends, is_filled.nonzero().flatten())
    _layouts[cu_seqlens] = layout
    return layout


def _fla_kda(
    x: _Inputs, output_final_state: bool, is_normalised: bool
) -> tuple[Tensor, Tensor | None]:
    """FLA's kernels, with gate, beta and L2 norm inside them."""
    chunk_kda, fused_recurrent_kda, _ = _fla_kernels()
    assert chunk_kda is not None and fused_recurrent_kda is not None
    is_recorded = needs_grad(*x)
    is_short = x.q.shape[1] <= RECURRENT_TOKENS and not is_recorded
    kernel = fused_recurrent_kda if is_short else chunk_kda
    layout = None if x.cu_seqlens is None else fla_layout(x.cu_seqlens)
    filled = None if layout is None else layout.filled
    state = x.initial_state
    if state is not None:
        state = (state if filled is None else state.index_select(0, filled)).float().contiguous()
    # FLA's own sigmoid, a Function of two more kernels, takes the host three times as long
    out, final = kernel(
        q=x.q,
        k=x.k,
        v=x.v,
        g=x.g,
        beta=x.beta.float().sigmoid() if is_recorded else x.beta,
        A_log=x.A_log.float().reshape(-1).contiguous(),
        dt_bias=x.dt_bias.float().reshape(-1).contiguous(),
        scale=x.q.shape[-1] ** -0.5,
        initial_state=state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=not is_normalised,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=not is_recorded,
        cu_seqlens=None if layout is None else layout.filled_ends,
    )
    if not output_final_state:
        return out, None
    if filled is not None:
        whole = x.initial_state
        if whole is None:
            whole = final.new_zeros(x.num_sequences, *final.shape[1:])
        final = whole.float().index_copy(0, filled, final)
    return out, final


# -------------------------------------------------------------------------------------------- entry
def kda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    state_out: Tensor | None = None,
    is_normalised: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over whole sequences, pieces of them, or single tokens.

    Args:
        q: queries [B, T, H, K] after convolution and SiLU, not normalised.
        k: keys [B, T, H, K], likewise.
        v: values [B, T, H, V].
        g: raw gate [B, T, H, K], before dt_bias and softplus.
        beta: logits [B, T, H], before the sigmoid.
        A_log: log decay rate, H elements in any shape, fp32.
        dt_bias: gate bias [H * K], fp32.
        initial_state: fp32 [N, H, K, V], None for zero; N is B, or the number of packed sequences.
        output_final_state: return the state after the last token too.
        cu_seqlens: int32 or int64 [N + 1], ends of packed sequences, with B = 1; empty ones are
            allowed and hand their initial state through.
        state_out: tensor like the final state, which may be `initial_state` itself: the final state
            is written to it and returned. Ignored where a graph is recorded.
        is_normalised: q and k have an L2 norm of 1 already, so that it need not be computed; where
            it is nevertheless, nothing changes but rounding.
        backend: "auto", "fla" or "torch", see `resolve_backend`.

    Returns:
        (o, state): o [B, T, H, V] in v's dtype; state fp32 [N, H, K, V] or None. float64 inputs are
        computed, and their state returned, in float64; all others in fp32.

    Raises:
        ValueError: for shapes that do not fit, a wrong cu_seqlens, or a backend that cannot run.
    """
    inputs = _Inputs(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens).checked()
    chosen = resolve_backend(q, backend, head_dims=(q.shape[-1], v.shape[-1]))
    if needs_grad(*inputs):
        state_out = None
    if is_transformed():
        with no_autocast(q.device):
            return _recurrent(inputs, output_final_state)
    if chosen == "fla" and q.shape[1] > 0:
        out, state = _fla_kda(inputs, output_final_state, is_normalised)
    elif q.shape[1] == 1 and cu_seqlens is None and not needs_grad(*inputs):
        with no_autocast(q.device):
            if initial_state is not None and _fits(state_out, initial_state, q):
                return _step_in_place(inputs, state_out), state_out
            out, state = _recurrent(inputs, output_final_state)
    else:
        out, state = chunked_kda(
            *inputs[:5],
            A_log=A_log,
            dt_bias=dt_bias,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    if state is not None and state_out is not None and state_out.dtype == state.dtype:
        state = state_out.copy_(state)
    return out, state


def _fits(state_out: Tensor | None, initial_state: Tensor, q: Tensor) -> TypeGuard[Tensor]:
    """Whether a step may write its state to `state_out`."""
    return state_out is not None and state_out.dtype == initial_state.dtype == compute_dtype(q)
