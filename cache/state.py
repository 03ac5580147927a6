"""The state of a KDA layer between two of its tokens.

Shapes: B batch, H heads, K key size, V value size, D = H * K, W convolution width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KDAState:
    """What a KDA layer carries from token to token; None stands for zeros.

    Attributes:
        conv: [B, 3, D, W - 1], the last inputs of the q, k and v convolutions, oldest first.
        recurrent: [B, H, K, V] float32.
    """

    conv: Tensor | None = None
    recurrent: Tensor | None = None
    is_kept = True  # whether the state after what is read now is wanted

    def entering(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """The recurrent state before these inputs of the recurrence (q, k, v, g, beta)."""
        return self.recurrent

    def tensors(self) -> list[Tensor]:
        """The tensors that are not None."""
        return [x for x in (self.conv, self.recurrent) if x is not None]

    @staticmethod
    def joined(states: "list[KDAState]") -> "KDAState":
        """The rows of several states, in one."""
        conv, recurrent = [x.conv for x in states], [x.recurrent for x in states]
        return KDAState(_joined(conv), _joined(recurrent))

    def rows(self) -> "list[KDAState]":
        """A state for each row, in the same memory."""
        assert self.conv is not None and self.recurrent is not None
        both = zip(self.conv.split(1), self.recurrent.split(1), strict=True)
        return [KDAState(*row) for row in both]

    def map(self, function: Callable[[Tensor], Tensor]) -> "KDAState":
        """A state of what `function` makes of each tensor."""
        return KDAState(*(None if x is None else function(x) for x in (self.conv, self.recurrent)))


def _joined(rows: list[Tensor | None]) -> Tensor | None:
    there = [x for x in rows if x is not None]
    if not there:
        return None
    return torch.cat([torch.zeros_like(there[0]) if x is None else x for x in rows])
