"""Products of float8 rows and float8 weights by cuBLAS, in blocks of 128 inputs and outputs.

From CUDA 12.9 on it has them for Hopper, by DeepSeek-V3's scheme as `float8.py` has it; the order
of a block's bytes does not matter, as it is that of both factors.

Shapes: T rows, N outputs, K inputs, B = K / 128 blocks of a row.
"""

import re
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.schemes import FLOAT8_BLOCK

FIRST_CUDA = (12, 9)
ARCHITECTURE = 90  # the only one
DTYPES = (torch.bfloat16,)  # of results
MULTIPLE = 4  # of rows, and of the scales of a row of weights


@cache
def has_block_products(architecture: int) -> bool:
    """Whether this torch has them, for a GPU's compute capability, 90 for 9.0."""
    version = re.match(r"(\d+)\.(\d+)", torch.version.cuda or "0.0")
    assert version is not None
    is_new = tuple(map(int, version.groups())) >= FIRST_CUDA
    return architecture == ARCHITECTURE and is_new and hasattr(F, "scaled_mm")


def fits(num_rows: int, weights: Any, dtype: torch.dtype) -> bool:
    """Whether cuBLAS takes this many rows and packed weights [N, K], for a result of a dtype."""
    scheme, (num_outputs, num_inputs) = weights.scheme, weights.shape
    is_square = scheme.rows == scheme.group == FLOAT8_BLOCK
    has_whole_blocks = num_outputs % FLOAT8_BLOCK == num_inputs % FLOAT8_BLOCK == 0
    return is_square and has_whole_blocks and num_rows % MULTIPLE == 0 and dtype in DTYPES


def block_product(codes: Tensor, scale: Tensor, matrix: Tensor, weights: Any) -> Tensor:
    """[T, N] in bfloat16.

    Args:
        codes, scale: of rows, float8 [T, K] and float32 [B, T].
        matrix: the weights' codes, float8 [N, bytes of a row].
        weights: packed, which `fits`.
    """
    scaling: Any = F.ScalingType  # type: ignore[attr-defined]
    return F.scaled_mm(  # type: ignore[attr-defined]
        codes,
        matrix[:, : codes.shape[1]].t(),
        scale.t(),
        scaling.BlockWise1x128,
        block_scales(weights),
        scaling.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def block_scales(weights: Any) -> Tensor:
    """Float32 scales [a multiple of 4 that holds B, N / 128] of which columns lie in memory; made
    once, and again for scales that were written to."""
    held, known = weights.scale, getattr(weights, "block_scales", None)
    key = held.data_ptr(), None if held.is_inference() else held._version
    if known is None or known[0] != key:
        with torch.inference_mode(False), torch.no_grad():  # recordings write later ones to it
            wide = weights.scales().float()
            padded = F.pad(wide, (0, -wide.shape[1] % MULTIPLE)).contiguous()
        known = weights.block_scales = key, padded.t()
    found: Tensor = known[1]
    return found
