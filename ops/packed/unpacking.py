"""Packed weights written out in full, on a GPU.

Shapes: M matrices, N outputs, K inputs, W words of a row, G groups of a row.
"""

# mypy: disable-error-code="no-untyped-def,union-attr"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.launch import is_jit_function
from kimi_linear.ops.packed.kernels import RUN, block_values, load_scales, load_words
from kimi_linear.ops.runtime import ceil_div, is_traced, jit, tl, triton
from kimi_linear.schemes import BLOCK

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
ROWS = 32  # of a tile


def has_asm(kernel: Any, device: torch.device) -> bool:
    """Whether a kernel may use PTX: compiled, for CUDA."""
    return is_jit_function(kernel) and device.type == "cuda" and torch.version.hip is None


def form(weights: Any) -> dict[str, Any]:
    """The arguments by which kernels are told a scheme."""
    scheme = weights.scheme
    return {
        "BITS": scheme.bits,
        "GROUP": scheme.group or 0,
        "IS_FLOAT": scheme.is_float,
        "HAS_ZERO": weights.zero is not None,
        "SCALE": getattr(tl, str(weights.scale.dtype).rpartition(".")[2]),
    }


def planes(weights: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, high bits, and words of scales and zeros, with something in the place of what it has
    not."""
    scale = weights.scale.view(torch.int32)[..., 0]
    zero = scale if weights.zero is None else weights.zero.view(torch.int32)[..., 0]
    return weights.planes[0], weights.planes[-1], scale, zero


def can_unpack(weights: Any) -> bool:
    """Whether `unpack_on_gpu` takes these weights."""
    is_here = triton is not None and weights.device.type in DEVICES and not is_traced()
    is_exact = weights.zero is None or weights.scheme.bits < 8
    has_scales = weights.scale.dtype in (weights.dtype, torch.float32)
    return is_here and is_exact and weights.dtype in DTYPES and has_scales


def unpack_on_gpu(weights: Any, out: Tensor | None = None) -> Tensor:
    """`PackedWeights.dequantized`, into `out` if it is given."""
    scheme, (*outer, num_outputs, num_inputs) = weights.scheme, weights.shape
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
            SHARED=scheme.rows,
            ASM=has_asm(_unpack, low.device),
            ROWS=ROWS,
            num_warps=4,
            **form(weights),
        )
    return out


@jit
def _unpack(
    low,  # [M, N, W] and
    high,  # of 3 bits [M, N, W]
    scale,  # int32 [M, words, N / SHARED] and
    zero,  # alike, or anything
    out,  # [M, N, K]
    N,
    scale_words,  # of one row and
    zero_words,
    stride,  # from one word of a row to the next
    tiles,  # of one matrix
    K: tl.constexpr,
    SHARED: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALE: tl.constexpr,
):
    WORDS: tl.constexpr = (K + 255) // 256 * (64 if BITS == 8 else 32)
    matrix, block = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    n = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row = matrix * N + tl.minimum(n, N - 1)
    place = tl.minimum(n, N - 1) // SHARED
    words, upper = load_words(low + row[:, None] * WORDS, high + row[:, None] * WORDS, block, BITS)
    scales = load_scales(
        scale + matrix * scale_words * stride + place,
        zero + matrix * zero_words * stride + place,
        block,
        stride,
        K,
        GROUP,
        HAS_ZERO,
        SCALE,
    )
    values = block_values(
        words,
        upper,
        scales,
        block,
        BITS,
        GROUP,
        IS_FLOAT,
        HAS_ZERO,
        SCALE,
        ASM,
        out.dtype.element_ty,
    )
    for slot in tl.static_range(8):
        k = (block * 8 + slot) * 32 + tl.arange(0, RUN)[None, :]
        tl.store(out + row[:, None] * K + k, values[slot], mask=(n < N)[:, None] & (k < K))
