"""Codes in the order of compressed-tensors' `pack-quantized` files.

Codes of a row follow each other without gaps, the first in the lowest bits: eight codes are as many
bytes as a code has bits. Rows end at a whole int32, with zeros where no code is.

Shapes: N rows, K codes of a row, B bits of a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.runtime import ceil_div

WORD_BYTES = 4


def num_words(num_codes: int, bits: int) -> int:
    """Of a row of codes."""
    return ceil_div(num_codes * bits, 8 * WORD_BYTES)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] to int32 [N, ceil(K B / 32)]."""
    eights = F.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    if bits == 8:
        found = eights
    elif bits == 4:
        found = eights[..., 0::2] | (eights[..., 1::2] << 4)
    else:
        joined = eights[..., 0].to(torch.int32)
        for i in range(1, 8):
            joined |= eights[..., i].to(torch.int32) << (i * bits)
        found = torch.stack([(joined >> (8 * i)).to(torch.uint8) for i in range(bits)], dim=-1)
    found, size = found.flatten(1), num_words(codes.shape[1], bits) * WORD_BYTES
    found = F.pad(found[:, :size], (0, max(0, size - found.shape[1])))
    return found.flatten().view(torch.int32).view(len(codes), -1)


def from_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """int32 [N, ceil(K B / 32)] to codes uint8 [N, K = `num_codes`]."""
    # flat: rows of one word may have any stride
    found = words.flatten().contiguous().view(torch.uint8).view(len(words), -1)
    size = ceil_div(num_codes, 8) * bits
    found = F.pad(found, (0, max(0, size - found.shape[1])))[:, :size]
    if bits == 8:
        codes = found
    elif bits == 4:
        codes = torch.stack([found & 15, found >> 4], dim=-1).flatten(1)
    else:
        parts = found.unflatten(1, (-1, bits))
        joined = parts[..., 0].to(torch.int32)
        for i in range(1, bits):
            joined |= parts[..., i].to(torch.int32) << (8 * i)
        mask = (1 << bits) - 1
        codes = torch.stack([((joined >> (i * bits)) & mask).to(torch.uint8) for i in range(8)], -1)
        codes = codes.flatten(1)
    return codes[:, :num_codes].contiguous()
