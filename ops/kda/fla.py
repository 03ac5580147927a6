"""KDA by FLA's kernels, with gate, beta and L2 norm inside them, and the choice of FLA.

Shapes: B batch, T tokens, H heads, K key size, V value size, N sequences.
"""

import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from kimi_linear.ops.fla.tuning import use_known_configs
from kimi_linear.ops.kda.recurrent import KDAInputs
from kimi_linear.ops.runtime import is_transformed, needs_grad
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Backend = Literal["auto", "fla", "torch"]

FLA_DEVICES = ("cuda", "xpu", "npu")
FLA_HEAD_DIMS = (16, 256)
# Up to this many tokens FLA's recurrence, one launch, is faster than its chunked form, nine.
RECURRENT_TOKENS = 64


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


def fla_kda(
    x: KDAInputs, output_final_state: bool, is_normalised: bool
) -> tuple[Tensor, Tensor | None]:
    """`kda_attention` by FLA: its recurrence for short calls without a graph, else its chunks."""
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


__all__ = ["fla_kda", "fla_layout", "resolve_backend"]
