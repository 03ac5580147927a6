"""KDA as matrix products over chunks (the report's equations 5 to 9), in torch, on any device.

Shapes: B batch, T tokens, H heads, K key size, V value size, C chunk, R sequences of a segment,
L tokens of each of them with padding, n chunks of a segment, G = n R H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_linear.ops.kda.recurrent import KDAInputs, l2norm, log_decay
from kimi_linear.ops.kda.segments import Segment, plan_segments
from kimi_linear.ops.runtime import compute_dtype, no_autocast, spare


def chunked_kda(x: KDAInputs, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """`kda_attention` by chunks. Differentiable once, also through both states.

    Memory beyond inputs and outputs is that of one segment and, where gradients are needed, one
    state per segment.
    """
    segments = plan_segments(x.q, x.cu_seqlens, max(x.q.shape[-1], x.v.shape[-1]))
    options = x.is_normalised, output_final_state, segments, x.num_sequences
    return _ChunkedKDA.apply(*options, x.initial_state, *x[:7])


class _ChunkedKDA(torch.autograd.Function):
    """Segments without a graph; backward recomputes one at a time, so that memory stays bounded."""

    @staticmethod
    def forward(
        ctx: Any,
        is_normalised: bool,
        output_final_state: bool,
        segments: list[Segment],
        num_sequences: int,
        initial_state: Tensor | None,
        *inputs: Tensor,  # q, k, v, g, beta, A_log, dt_bias
    ) -> tuple[Tensor, Tensor | None]:
        q, v = inputs[0], inputs[2]
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
            saved.append(state.clone() if keep and state is not None else None)
            picked = [segment.pick(x) for x in inputs[:5]]
            want = output_final_state or not segment.is_last
            with no_autocast(q.device):
                chunks, state_out = _run_segment(
                    (*picked, *inputs[5:]), is_normalised, state, segment, want
                )
            segment.put_chunks(out, chunks)
            if states is not None and state_out is not None:
                states[segment.rows] = state_out
        ctx.save_for_backward(*inputs, *saved)
        ctx.segments, ctx.output_final_state = segments, output_final_state
        ctx.is_normalised = is_normalised
        ctx.state_shape = None if states is None else states.shape
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return out, (states if output_final_state else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_final: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # read once: checkpointing recomputes them
        inputs, saved = tensors[:7], tensors[7:]
        dtype = compute_dtype(inputs[0])
        grads = [torch.zeros_like(x) for x in inputs]
        grad_states: Tensor | None = None
        if grad_final is not None:
            grad_states = grad_final.to(dtype, copy=True)
        elif ctx.state_shape is not None:
            grad_states = inputs[0].new_zeros(ctx.state_shape, dtype=dtype)
        for segment, state in zip(reversed(ctx.segments), reversed(saved), strict=True):
            grad_state = None
            if grad_states is not None and (ctx.output_final_state or not segment.is_last):
                grad_state = grad_states[segment.rows]
            found = _segment_grads(inputs, ctx.is_normalised, state, segment, grad_out, grad_state)
            for grad, piece in zip(grads[:5], found[:5], strict=True):
                segment.put(grad, piece)
            grads[5] += found[5]
            grads[6] += found[6]
            if grad_states is not None and state is not None:
                grad_states[segment.rows] = found[7]
        grad_initial = None
        if grad_states is not None and ctx.initial_dtype is not None:
            grad_initial = grad_states.to(ctx.initial_dtype)
        return None, None, None, None, grad_initial, *grads


def _segment_grads(
    inputs: Sequence[Tensor],
    is_normalised: bool,
    state: Tensor | None,
    segment: Segment,
    grad_out: Tensor,
    grad_state: Tensor | None,
) -> Sequence[Tensor]:
    """Recompute a segment: gradients by its seven inputs and by its state, if it has one."""
    leaves = [segment.pick(x) for x in inputs[:5]] + list(inputs[5:])
    if state is not None:
        leaves.append(state)
    leaves = [x.detach().requires_grad_() for x in leaves]
    with no_autocast(grad_out.device):
        with torch.enable_grad():
            state = None if state is None else leaves[7]
            roots, state_out = _run_segment(
                leaves[:7], is_normalised, state, segment, grad_state is not None
            )
        wide = segment.by_chunk(segment.pick(grad_out)).to(roots[0].dtype)
        grads = list(wide.flatten(1, 2).unbind())
        if state_out is not None and grad_state is not None:
            roots.append(state_out)
            grads.append(grad_state)
        return torch.autograd.grad(roots, leaves, grads)


def _run_segment(
    inputs: Sequence[Tensor],
    is_normalised: bool,
    state: Tensor | None,
    segment: Segment,
    want_state: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Each chunk's output [R H, C, V], and the state after them.

    Takes q, k, v, g, beta [R, L, H, ...], A_log, dt_bias, and a state [R, H, K, V], or None for
    zero, which is overwritten where no graph is recorded.
    """
    q, k, v, g, beta, A_log, dt_bias = inputs
    dtype = compute_dtype(q)
    (R, _, H, K), V = q.shape, v.shape[-1]
    n, C = segment.num_chunks, segment.chunk_size

    qk = torch.stack((segment.by_chunk(q), segment.by_chunk(k)), dim=-2).to(dtype)
    scale = qk.new_tensor((K**-0.5, 1.0))[:, None]
    scaled = torch.mul if is_normalised else l2norm
    qk = scaled(qk, scale, out=spare(qk)).view(n * R * H, C, 2, K)
    gate = segment.by_chunk(g).to(dtype).contiguous().transpose(2, 3)
    gate = log_decay(gate, A_log, dt_bias).transpose(2, 3)
    if segment.valid is not None:
        gate = gate.masked_fill(~segment.by_chunk(segment.valid[:, :, None, None]), 0)
    decay = torch.exp(gate, out=spare(gate)).view(n * R * H, C, K)
    beta_GC = segment.by_chunk(beta.to(dtype)).reshape(n * R * H, C).sigmoid()
    v_nGCV = segment.by_chunk(v.to(dtype)).reshape(n, R * H, C, V)

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
    for row, score, column, chunk_decay, solve, value in chunks:
        if S is None:
            v_new = solve @ value
            outputs.append(score @ v_new)
        else:
            from_q, from_k = (row @ S).view(R * H, C, 2, V).unbind(2)
            v_new = solve @ (value - from_k)
            outputs.append(torch.baddbmm(from_q, score, v_new))
        if len(outputs) < n or want_state:
            if S is None:
                S = column @ v_new
            else:
                S = torch.mul(S, chunk_decay, out=spare(S))
                S = torch.baddbmm(S, column, v_new, out=spare(S))
    return outputs, (S.view(R, H, K, V) if want_state and S is not None else None)


def _intra_chunk(qk_GC2K: Tensor, decay_GCK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_IntraChunk`, without its tape where no gradients are recorded."""
    if torch.is_grad_enabled():
        return _IntraChunk.apply(qk_GC2K, decay_GCK)
    return _pair_blocks(qk_GC2K, decay_GCK, None)


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


def _pair_blocks(
    qk_GC2K: Tensor, decay_GCK: Tensor, tape: list[tuple[Tensor, Tensor, Tensor]] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of `_IntraChunk`; the tape takes each level's factors and decays. Without one, the
    rows overwrite qk."""
    G, C, _, K = qk_GC2K.shape
    scores = qk_GC2K.new_zeros(G, C, 2, C)
    columns = qk_GC2K[:, :, 0] * qk_GC2K[:, :, 1]
    scores[:, :, 0].diagonal(dim1=1, dim2=2).copy_(columns.sum(-1))
    columns.copy_(qk_GC2K[:, :, 1])
    spent = spare(qk_GC2K) if tape is None else None
    rows = torch.mul(qk_GC2K, decay_GCK[:, :, None], out=spent)
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
