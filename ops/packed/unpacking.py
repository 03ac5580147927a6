"""Packed weights written out in full, on a GPU.

Shapes: M matrices, N outputs, K inputs, W words of a row, G groups of a row.
"""

# mypy: disable-error-code="no-untyped-def,union-attr"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.launch import is_jit_function, launch_directly
from kimi_linear.ops.packed.kernels import RUN, block_values, load_scales, load_words
from kimi_linear.ops.runtime import ceil_div, is_traced, jit, tl, triton
from kimi_linear.schemes import BLOCK

# tuples of constants are Triton 3.4's
HAS_KERNELS = hasattr(triton, "constexpr_function")
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
ROWS = 32  # of a tile


def has_asm(kernel: Any, device: torch.device) -> bool:
    """Whether a kernel may use PTX: compiled, for CUDA."""
    return is_jit_function(kernel) and device.type == "cuda" and torch.version.hip is None


def form(weights: Any, kernel: Any) -> tuple[Any, ...]:
    """FORM of `kernels.py`, by which a kernel is told how weights are held."""
    scheme, scale = weights.scheme, str(weights.scale.dtype).rpartition(".")[2]
    return (
        scheme.bits,
        scheme.group or 0,
        scheme.is_float,
        weights.zero is not None,
        getattr(tl, scale),
        scheme.rows,
        has_asm(kernel, weights.planes[0].device),
    )


def planes(weights: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, high bits, and words of scales and zeros, with something in the place of what it has
    not."""
    scale = weights.scale.view(torch.int32)[..., 0]
    zero = scale if weights.zero is None else weights.zero.view(torch.int32)[..., 0]
    return weights.planes[0], weights.planes[-1], scale, zero


def words_by_matrix(weights: Any) -> dict[str, int]:
    """Words of scales and of zeros from one expert to the next, in words of a row: what kernels of
    weights [E, N, K] are compiled for."""
    zero = weights.zero
    return {
        "SCALE_WORDS": weights.scale.shape[1],
        "ZERO_WORDS": 1 if zero is None else zero.shape[1],
    }


def can_unpack(weights: Any) -> bool:
    """Whether `unpack_on_gpu` takes these weights."""
    is_here = HAS_KERNELS and weights.device.type in DEVICES and not is_traced()
    is_exact = weights.zero is None or weights.scheme.bits < 8
    has_scales = weights.scale.dtype in (weights.dtype, torch.float32)
    return is_here and is_exact and weights.dtype in DTYPES and has_scales


def unpack_on_gpu(weights: Any, out: Tensor | None = None) -> Tensor:
    """`PackedWeights.dequantized`, into `out` if it is given."""
    *outer, num_outputs, num_inputs = weights.shape
    if out is None:
        out = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    num_matrices = outer[0] if outer else 1
    low, high, scale, zero = planes(weights)
    tiles = ceil_div(num_outputs, ROWS)
    with torch.cuda.device_of(low):
        _unpack[(tiles * num_matrices, ceil_div(num_inputs, BLOCK))](
            low,
            high,
            scale,
            zero,
            out,
            num_outputs,
            scale.shape[-2],
            zero.shape[-2],
            scale.shape[-1],
            tiles,
            K=num_inputs,
            FORM=form(weights, _unpack),
            ROWS=ROWS,
            num_warps=4,
        )
    return out


@launch_directly
@jit
def _unpack(
    low,  # [M, N, W] and
    high,  # of 3 bits [M, N, W]
    scale,  # int32 [M, words, N / rows that share one] and
    zero,  # alike, or anything
    out,  # [M, N, K]
    N,
    scale_words,  # of one row and
    zero_words,
    stride,  # from one word of a row to the next
    tiles,  # of one matrix
    K: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    WORDS: tl.constexpr = (K + 255) // 256 * (64 if FORM[0] == 8 else 32)
    matrix, block = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    n = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row = matrix * N + tl.minimum(n, N - 1)
    words, upper = load_words(low + row * WORDS, high + row * WORDS, block, FORM)
    place = tl.minimum(n, N - 1) // FORM[5]
    scale += matrix * scale_words * stride
    zero += matrix * zero_words * stride
    scales = load_scales(scale + place, zero + place, block, stride, K, FORM)
    values = block_values(words, upper, scales, block, FORM, out.dtype.element_ty)
    for slot in tl.static_range(8):
        k = (block * 8 + slot) * 32 + tl.arange(0, RUN)[None, :]
        tl.store(out + row[:, None] * K + k, values[slot], mask=(n < N)[:, None] & (k < K))
