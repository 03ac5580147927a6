"""Updates of a KDA state that it has not taken in yet: what makes the last step's tokens cheap to
take back.

A token changes the state S [K, V] of a head to diag(decay) S + key correction^T, where correction
is beta (v - (diag(decay) S)^T key): 3 vectors instead of a matrix. A step of several tokens leaves
the state as it was before them and writes these vectors down. The next step takes in those that are
still wanted, on its way, since it reads and writes the state anyway; `crop` only counts.

Shapes: B batch, C capacity, D = H * K, H heads, K key and value size, W convolution width.
"""

import torch
from torch import Tensor

from kimi_linear.cache.layer import may_write
from kimi_linear.cache.state import KDAState
from kimi_linear.ops.runtime import power_of_two

# Tokens of a row that a step takes at most.
STEP_TOKENS = 16


class PendingUpdates:
    """The updates of one KDA layer's last tokens. That of the text's token p, counted from 0, lies
    at place p % C, so that new ones never overwrite those that are taken in meanwhile.

    Attributes:
        updates: [B, C, 3, D] float32: decay, key and correction; None while no step needs it.
        inputs: [B, C, 3, D], the inputs of the q, k and v convolutions.
        count: The last tokens that are not in the state.
    """

    def __init__(self) -> None:
        self.updates: Tensor | None = None
        self.inputs: Tensor | None = None
        self.count = 0

    def has_room(self, num_rows: int, num_tokens: int) -> bool:
        """Whether a step of `num_tokens` tokens a row can write its updates."""
        updates = self.updates
        if updates is None or updates.shape[0] != num_rows or not may_write(updates):
            return False
        return self.count + num_tokens <= updates.shape[1]

    def reserve(self, state: KDAState, num_tokens: int) -> None:
        """Make room for steps of `num_tokens` tokens behind as many; what was held is lost."""
        conv, recurrent = state.conv, state.recurrent
        assert conv is not None and recurrent is not None and not self.count
        shape = conv.shape[0], 2 * power_of_two(num_tokens), *conv.shape[1:3]
        self.updates = recurrent.new_zeros(shape)
        self.inputs = conv.new_zeros(shape)

    def taken_in(self, state: KDAState, num_tokens: int) -> KDAState:
        """The state after all updates, which are the last ones of a text of `num_tokens`."""
        conv, recurrent = state.conv, state.recurrent
        assert self.updates is not None and self.inputs is not None
        assert conv is not None and recurrent is not None
        last = torch.arange(num_tokens - self.count, num_tokens, device=conv.device)
        places = last % self.updates.shape[1]
        heads = recurrent.shape[1:3]
        for update in self.updates[:, places].unflatten(-1, heads).unbind(1):
            decay, key, correction = update.unbind(1)  # [B, H, K] each
            added = key[..., :, None] * correction[..., None, :]
            recurrent = recurrent * decay[..., None] + added
        inputs = self.inputs[:, places].permute(0, 2, 3, 1)  # [B, 3, D, count]
        width = conv.shape[-1]
        return KDAState(torch.cat([conv, inputs], dim=-1)[..., -width:].contiguous(), recurrent)

    def tensors(self) -> list[Tensor]:
        """The tensors that are not None."""
        return [x for x in (self.updates, self.inputs) if x is not None]
