"""KDA by FLA's kernels, with gate, beta and L2 norm inside them.

Shapes: B batch, T tokens, H heads, K key size, V value size, N sequences.
"""

from typing import Any

from torch import Tensor

from kimi_linear.ops.fla.backend import fla_layout, kda_kernels
from kimi_linear.ops.kda.recurrent import KDAInputs
from kimi_linear.ops.runtime import needs_grad

# Up to this many tokens FLA's recurrence, one launch, is faster than its chunked form, nine.
RECURRENT_TOKENS = 64


def fla_kda(x: KDAInputs, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """`kda_attention` by FLA: its recurrence for short calls without a graph, else its chunks."""
    chunk_kda, fused_recurrent_kda, _ = kda_kernels()
    assert chunk_kda is not None and fused_recurrent_kda is not None
    is_recorded = needs_grad(*x.tensors)
    is_short = x.q.shape[1] <= RECURRENT_TOKENS and not is_recorded
    kernel = fused_recurrent_kda if is_short else chunk_kda
    layout = None if x.cu_seqlens is None else fla_layout(x.cu_seqlens)
    filled = None if layout is None else layout.filled
    state = x.initial_state
    if state is not None:
        state = (state if filled is None else state.index_select(0, filled)).float().contiguous()
    known: dict[str, Any] = {}
    if layout is not None and not is_short:
        known["cu_seqlens_cpu"] = layout.host_filled_ends
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
        use_qk_l2norm_in_kernel=not x.is_normalised,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=not is_recorded,
        cu_seqlens=None if layout is None else layout.filled_ends,
        **known,
    )
    if not output_final_state:
        return out, None
    if filled is not None:
        whole = x.initial_state
        if whole is None:
            whole = final.new_zeros(x.num_sequences, *final.shape[1:])
        final = whole.float().index_copy(0, filled, final)
    return out, final
