"""Numbers on their way from the device to the host."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy that is queued at once, so that reading it does not wait for what the device is given
    to do afterwards.

    Args:
        numbers: On any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._copied: Any = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[Any]:
        """The numbers; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()
