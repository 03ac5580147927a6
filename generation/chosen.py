"""Tokens that were chosen on the device, on their way to the host."""

from typing import Any

import torch
from torch import Tensor


class Chosen:
    """The next token of some texts. The copy is queued at once, so that reading it does not wait
    for what the device is given to do afterwards.

    Args:
        rows: Where the texts decode.
        states: Their requests.
        tokens: [texts] int64.
        logprobs: float32 [texts], or None.
    """

    def __init__(
        self, rows: list[int], states: list[Any], tokens: Tensor, logprobs: Tensor | None
    ) -> None:
        self.rows, self.states = rows, states
        is_cuda = tokens.is_cuda
        self._tokens = tokens.to("cpu", non_blocking=is_cuda)
        self._logprobs = None if logprobs is None else logprobs.to("cpu", non_blocking=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def values(self) -> list[tuple[int, Any, int, float | None]]:
        """Row, request, token and its log probability of each text; waits for the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        logprobs: list[Any] = [None] * len(self.rows)
        if self._logprobs is not None:
            logprobs = self._logprobs.tolist()
        return list(zip(self.rows, self.states, self._tokens.tolist(), logprobs, strict=True))
