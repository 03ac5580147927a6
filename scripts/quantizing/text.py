"""A text on its way through the layers: hidden states on the host, a few rows at a time elsewhere.

Shapes: B rows, T tokens of a row, D hidden size, K inputs of a matrix.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kimi_linear.checkpoints.files import DTYPES, StoredTensor, read_blocks
from kimi_linear.layers.planner import Planner
from kimi_linear.ops.packed.gptq import second_moment
from quantizing.writing import TensorFile

# Tokens that a layer reads at once.
CALL_TOKENS = 16384
NAME = "hidden"


class Text:
    """Rows of a text, and what the layers so far have made of them.

    Args:
        backbone: The model, which may be on the meta device.
        positions: [B, T] int64, which restart where a text begins.
        device: Of the layers.

    Attributes:
        hidden: [B, T, D], on the CPU.
    """

    hidden: Tensor

    def __init__(self, backbone: Any, positions: Tensor, device: torch.device) -> None:
        self.backbone, self.positions, self.device = backbone, positions, device

    def calls(self) -> Iterator[tuple[slice, Tensor, Any]]:
        """Some rows at a time: which, hidden states [.., T, D] on the device, a layer's plan."""
        num_rows, length = self.positions.shape
        step = max(1, CALL_TOKENS // length)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            hidden = self.hidden[rows].to(self.device)
            positions = self.positions[rows].to(self.device)
            planner = Planner()
            plan = planner.plan(self.backbone, hidden, None, None, False, position_ids=positions)
            yield rows, hidden, plan

    def change(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        """Put a layer's results in the place of its inputs; it is given those and a plan."""
        for rows, hidden, plan in self.calls():
            self.hidden[rows] = function(hidden, plan).cpu()

    def moment(self, function: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """[K, K]: the mean over tokens of each times each of the numbers [.., K] that a function
        makes of hidden states and their plan."""
        total, count = None, 0
        for _, hidden, plan in self.calls():
            numbers = function(hidden, plan).flatten(0, -2)
            found = second_moment(numbers)
            total, count = found if total is None else total.add_(found), count + len(numbers)
        assert total is not None
        return total / count

    def save(self, file: Any) -> None:
        """Write the hidden states to a file."""
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.hidden.dtype)
        with TensorFile(file, [(NAME, tuple(self.hidden.shape), dtype)]) as target:
            target.write(NAME, self.hidden)

    def load(self, file: Any) -> None:
        """Read them back."""
        block = read_blocks(str(file))[NAME]
        self.hidden = StoredTensor([block], block.shape, DTYPES[block.dtype])[...]
