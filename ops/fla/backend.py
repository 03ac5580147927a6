"""FLA or torch: which of them computes, and FLA's kernels, imported on first use.

Shapes: N sequences.
"""

import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kimi_linear.ops.fla.tuning import use_known_configs
from kimi_linear.ops.runtime import KERNEL_DTYPES, is_transformed

Backend = Literal["auto", "fla", "torch"]

FLA_DEVICES = ("cuda", "xpu", "npu")
FLA_HEAD_DIMS = (16, 256)


@functools.cache
def kda_kernels() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None, str]:
    """(chunk_kda, fused_recurrent_kda, "") or (None, None, why not)."""
    try:
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
    except (ImportError, RuntimeError, AttributeError) as error:  # absent, or a broken triton
        return None, None, f"{type(error).__name__}: {error}"
    use_known_configs()
    return chunk_kda, fused_recurrent_kda, ""


@functools.cache
def convolution_kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(causal_conv1d, causal_conv1d_update); they moved between fla 0.5 and 0.6."""
    try:
        from fla.modules.causal_conv1d import causal_conv1d, causal_conv1d_update
    except ImportError:
        try:
            from fla.modules.conv.causal_conv1d import causal_conv1d
            from fla.modules.conv.triton.ops import causal_conv1d_update
        except ImportError as error:
            raise _too_old("causal_conv1d", error) from error
    use_known_configs()
    return causal_conv1d, causal_conv1d_update


@functools.cache
def norm_kernel() -> Callable[..., Tensor]:
    """rms_norm_gated."""
    try:
        from fla.modules.fused_norm_gate import rms_norm_gated
    except ImportError as error:
        raise _too_old("rms_norm_gated", error) from error
    use_known_configs()
    return rms_norm_gated


def _too_old(name: str, error: ImportError) -> ValueError:
    return ValueError(
        f"backend is 'fla', but this fla has no {name} ({error}); "
        "fla-core 0.5.1 or newer is needed, or backend='torch'"
    )


def _obstacle(tensor: Tensor, head_dims: Sequence[int]) -> str:
    """Why FLA cannot take this tensor, or ""."""
    if is_transformed():
        return "a transform of torch.func is at work"
    if tensor.device.type not in FLA_DEVICES:
        return f"the tensor is on {tensor.device.type!r}, FLA needs one of {FLA_DEVICES}"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"FLA has no kernels for {tensor.dtype}"
    low, high = FLA_HEAD_DIMS
    if any(not low <= size <= high for size in head_dims):
        return f"head sizes are {tuple(head_dims)}, FLA takes {low} to {high}"
    reason = kda_kernels()[2]
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
    obstacle = _obstacle(tensor, head_dims)
    if backend == "fla" and obstacle:
        raise ValueError(f"backend is 'fla', but {obstacle}; allowed here are 'auto' and 'torch'")
    return "torch" if obstacle else "fla"


class FlaLayout(NamedTuple):
    """A packed layout as FLA takes it."""

    version: int | None  # of the tensor it was made from; None cannot be checked
    all_ends: Tensor  # int64 [N + 1], a tensor of its own
    filled_ends: Tensor  # the same without empty sequences
    host_filled_ends: Tensor  # the same on the host
    filled: Tensor | None  # int64, the sequences that are not empty; None means all


_layouts: MutableMapping[Tensor, FlaLayout] = WeakIdKeyDictionary()


def fla_layout(cu_seqlens: Tensor) -> FlaLayout:
    """FLA's form of cu_seqlens, made once per tensor and again when the tensor was written to.

    FLA keeps what it derives from cu_seqlens by the identity of the tensor, so a buffer refreshed
    in place would give stale chunks: every content gets a tensor of its own. (A write that torch
    does not count, such as one inside a replayed CUDA graph, cannot be seen.) Making it reads the
    lengths on the host, unless `prepare_fla_layout` was told them.
    """
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    layout = _layouts.get(cu_seqlens)
    if layout is not None and version is not None and layout.version == version:
        return layout
    return prepare_fla_layout(cu_seqlens, cu_seqlens.cpu())


def prepare_fla_layout(cu_seqlens: Tensor, host_ends: Tensor) -> FlaLayout:
    """FLA's form of cu_seqlens, whose content the host knows: nothing waits for the device."""
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    device, host_ends = cu_seqlens.device, host_ends.to(torch.int64, copy=True)
    all_ends = host_ends.to(device, non_blocking=True, copy=True)
    is_filled = host_ends.diff() > 0
    layout = FlaLayout(version, all_ends, all_ends, host_ends, None)
    if not bool(is_filled.all()):
        host_filled = torch.cat((host_ends[:1], host_ends[1:][is_filled]))
        filled_ends, filled = (
            x.to(device, non_blocking=True, copy=True)
            for x in (host_filled, is_filled.nonzero().flatten())
        )
        layout = FlaLayout(version, all_ends, filled_ends, host_filled, filled)
    _layouts[cu_seqlens] = layout
    return layout
