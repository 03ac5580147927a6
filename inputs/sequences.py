"""Which sequence each place of a call belongs to, for means over sequences.

Shapes: N = B * T places of a call, S sequences in them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kimi_linear.inputs.layout import SequenceLayout


@dataclass(frozen=True)
class TokenSequences:
    """The sequences of a call's places.

    Attributes:
        number_N: int64, the number of each place's sequence; S at padding.
        weight_N: float32 or wider, each place's weight in a mean over its sequence; 0 at padding.
        lengths_S: int64, the sequences' tokens; empty ones may be among them.
    """

    number_N: Tensor
    weight_N: Tensor
    lengths_S: Tensor

    def to(self, device: torch.device) -> "TokenSequences":
        """A copy on another device."""
        number, weight = self.number_N.to(device), self.weight_N.to(device)
        return replace(self, number_N=number, weight_N=weight, lengths_S=self.lengths_S.to(device))

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes that have places of these sequences: here there is one."""
        return x


def token_sequences(
    layout: SequenceLayout, batch_size: int, num_tokens: int, like: Tensor
) -> TokenSequences:
    """The sequences of B x T places, on the device of `like`."""
    places, device = batch_size * num_tokens, like.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    if layout.cu_seqlens is None:
        rows = torch.arange(batch_size, device=device)
        real = layout.unpack(
            torch.ones(batch_size, num_tokens, dtype=dtype, device=device), batch_size
        )
        lengths = real.sum(dim=1)
        number = torch.where(real > 0, rows[:, None], batch_size)
        weight = real / lengths.clamp(min=1)[:, None]
        return TokenSequences(number.flatten(), weight.flatten(), lengths.long())
    lengths = layout.cu_seqlens.to(device).diff().long()
    index = layout.token_index
    index = torch.arange(places, device=device) if index is None else index.to(device)
    numbers = torch.arange(lengths.numel(), device=device)
    numbers = numbers.repeat_interleave(lengths, output_size=index.numel())
    number = torch.full((places,), lengths.numel(), device=device).index_copy(0, index, numbers)
    weight = torch.zeros(places, dtype=dtype, device=device)
    weight = weight.index_copy(0, index, 1 / lengths[numbers].to(dtype))
    return TokenSequences(number, weight, lengths)
