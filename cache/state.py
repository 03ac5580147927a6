"""The state of a KDA layer between two of its tokens.

Shapes: B batch, H heads, K key size, V value size, D = H * K, W convolution width.
"""

from collections.abc import Callable
from dataclasses import dataclass

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

    def map(self, function: Callable[[Tensor], Tensor]) -> "KDAState":
        """A state of what `function` makes of each tensor."""
        return KDAState(*(None if x is None else function(x) for x in (self.conv, self.recurrent)))
