"""Kimi Delta Attention (KDA).

Technical report (arXiv 2510.26692), section 3. Per head, with alpha_t = exp(g_t) in (0, 1]^K:

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        S in R^{K x V}
    o_t = S_t^T q_t

Everything here takes raw inputs, as they leave the short convolutions and the gate projections,
and does the L2 norm of q and k (eps 1e-6 inside the root), the scale K^-1/2 on q, the log decay
g = -exp(A_log) softplus(g_raw + dt_bias) and beta = sigmoid(beta_raw) itself.

`kda_attention` is the entry. It chooses among `recurrent.py`, the recurrence and ground truth,
`chunked.py`, its chunked form in torch, and `fla.py`, FLA's kernels.

Shapes: B batch, T tokens, H heads, K key size, V value size, N sequences.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.fla.backend import resolve_backend
from kimi_linear.ops.kda.chunked import chunked_kda
from kimi_linear.ops.kda.fla import fla_kda
from kimi_linear.ops.kda.recurrent import KDAInputs, can_step_in_place, recurrent_kda, step_in_place
from kimi_linear.ops.runtime import is_transformed, needs_grad


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
        k: keys [B, T, H, K], as q.
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
        is_normalised: the L2 norm of q and k is done: a second one would make small heads, which
            the eps leaves shorter than 1, longer.
        backend: "auto", "fla" or "torch", see `resolve_backend`.

    Returns:
        (o, state): o [B, T, H, V] in v's dtype; state fp32 [N, H, K, V] or None. float64 inputs are
        computed, and their state returned, in float64; all others in fp32.

    Raises:
        ValueError: for shapes that do not fit, a wrong cu_seqlens, or a backend that cannot run.
    """
    sources = q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
    x = KDAInputs(*sources, is_normalised).checked()
    chosen = resolve_backend(q, backend, head_dims=(q.shape[-1], v.shape[-1]))
    if is_transformed():
        return recurrent_kda(x, output_final_state)
    is_recorded = needs_grad(*x.tensors)
    if is_recorded:
        state_out = None
    is_step = q.shape[1] == 1 and cu_seqlens is None and not is_recorded
    if chosen == "fla" and q.shape[1] > 0:
        out, state = fla_kda(x, output_final_state)
    elif is_step and can_step_in_place(state_out, x):
        return step_in_place(x, state_out), state_out
    elif is_step:
        out, state = recurrent_kda(x, output_final_state)
    else:
        out, state = chunked_kda(x, output_final_state)
    if state is not None and state_out is not None and state_out.dtype == state.dtype:
        state = state_out.copy_(state)
    return out, state


def kda_attention_and_cut(
    inputs: tuple[Tensor, ...],
    cut: int,
    *,
    initial_state: Tensor | None = None,
    state_out: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`kda_attention` of q, k, v, g, beta, and the state after the first `cut` tokens; None for 0.

    The other arguments are those of `kda_attention`, for rows of one sequence each.
    """
    if not cut:
        out, state = kda_attention(
            *inputs, initial_state=initial_state, state_out=state_out, **kwargs
        )
        return out, state, None
    first, rest = [x[:, :cut] for x in inputs], [x[:, cut:] for x in inputs]
    before, at_cut = kda_attention(*first, initial_state=initial_state, **kwargs)
    after, state = kda_attention(*rest, initial_state=at_cut, state_out=state_out, **kwargs)
    return torch.cat([before, after], dim=1), state, at_cut
