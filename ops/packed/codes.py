"""The order of codes in memory.

A row's codes stand in runs of `RUN` = 32 words. Word j of a run holds, for each of its slots s, the
code of its input s * 32 + j: what a word is taken apart into belongs to equally many tiles of 32
neighbouring inputs, each of which has the layout of the words themselves. A kernel so multiplies by
what it has unpacked without moving it between threads.

| bits | slots | a word                                                        |
|------|-------|---------------------------------------------------------------|
| 8    | 4     | int32, slot s in byte s                                       |
| 4    | 8     | int32, slots s and s + 4 in the lower and upper half of byte s |
| 3    | 8     | int16, slot s' low bits in 2 s and 2 s + 1; uint8, its high bit in bit s |

Rows are filled up to a multiple of `BLOCK` = 256 inputs with codes of 0.

Shapes: N outputs, K inputs, W words of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.schemes import BLOCK, RUN, Scheme

# Dtypes of a word's parts, and the bits of each slot in them.
PLANES = {
    3: ((torch.int16, 2), (torch.uint8, 1)),
    4: ((torch.int32, 4),),
    8: ((torch.int32, 8),),
}


def slot_shift(slot: int, bits: int) -> int:
    """The lowest bit of a slot in a word."""
    return slot % 4 * 8 + slot // 4 * 4 if bits == 4 else slot * bits


def pack(codes: Tensor, scheme: Scheme) -> tuple[Tensor, ...]:
    """Codes uint8 [.., N, K] to planes [.., N, W]."""
    slots, num_inputs = scheme.slots, codes.shape[-1]
    padded = F.pad(codes, (0, -num_inputs % BLOCK))
    blocks = padded.unflatten(-1, (-1, slots, RUN))  # [.., N, W / RUN, slots, RUN]
    planes, done = [], 0
    for dtype, bits in PLANES[scheme.bits]:
        wide = torch.int64 if dtype == torch.int32 else torch.int32
        words = blocks.new_zeros((*blocks.shape[:-2], RUN), dtype=wide)
        for slot in range(slots):
            part = (blocks[..., slot, :] >> done) & ((1 << bits) - 1)
            words |= part.to(wide) << slot_shift(slot, bits)
        planes.append(_signed(words, dtype).flatten(-2))
        done += bits
    return tuple(planes)


def _signed(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words of the same bits in a dtype that may be signed."""
    limit = 1 << (8 * dtype.itemsize)
    if dtype.is_signed:
        words = torch.where(words >= limit // 2, words - limit, words)
    return words.to(dtype)


def unpack(planes: tuple[Tensor, ...], scheme: Scheme, num_inputs: int) -> Tensor:
    """Planes [.., N, W] to codes uint8 [.., N, K = `num_inputs`]."""
    codes, done = None, 0
    for plane, (_, bits) in zip(planes, PLANES[scheme.bits], strict=True):
        words = plane.unflatten(-1, (-1, 1, RUN))
        places = [slot_shift(slot, bits) for slot in range(scheme.slots)]
        shifts = torch.tensor(places, device=plane.device, dtype=plane.dtype)
        part = (words >> shifts[:, None]) & ((1 << bits) - 1)  # [.., N, W / RUN, slots, RUN]
        part = part.to(torch.uint8) << done
        codes = part if codes is None else codes | part
        done += bits
    assert codes is not None
    return codes.flatten(-3)[..., :num_inputs]
