"""Tokens that were chosen on the device, on their way to the host."""

from typing import Any

from torch import Tensor

from kimi_linear.generation.host_copy import HostCopy


class Chosen:
    """The next tokens of some texts: one behind each that a step has read.

    Args:
        rows: Where the texts decode.
        states: Their requests.
        drafts: What was read behind the last token of each, T - 1 tokens.
        tokens: [texts, T] int64.
        logprobs: float32 [texts, T], or None.
    """

    def __init__(
        self,
        rows: list[int],
        states: list[Any],
        drafts: list[list[int]],
        tokens: Tensor,
        logprobs: Tensor | None,
    ) -> None:
        self.rows, self.states, self.drafts = rows, states, drafts
        self._tokens = HostCopy(tokens)
        self._logprobs = None if logprobs is None else HostCopy(logprobs)

    def values(self) -> list[tuple[int, Any, list[int], list[int], list[float | None]]]:
        """Row, request, draft, tokens and their log probabilities of each text; waits for them."""
        tokens = self._tokens.tolist()
        logprobs: list[Any] = [[None] * len(each) for each in tokens]
        if self._logprobs is not None:
            logprobs = self._logprobs.tolist()
        return list(zip(self.rows, self.states, self.drafts, tokens, logprobs, strict=True))
