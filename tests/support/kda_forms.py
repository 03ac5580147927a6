"""The forms of KDA in torch, with the arguments of `kda_attention`."""

import functools

from kimi_linear.ops.kda import chunked, recurrent


def _attend(
    form,
    q,
    k,
    v,
    g,
    beta,
    *,
    A_log,
    dt_bias,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    inputs = recurrent.KDAInputs(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    return form(inputs.checked(), output_final_state)


recurrent_kda = functools.partial(_attend, recurrent.recurrent_kda)
chunked_kda = functools.partial(_attend, chunked.chunked_kda)
