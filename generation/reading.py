"""Prompts of many requests, while they are read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.cache.hybrid import KimiLinearCache
from kimi_linear.ops.runtime import ceil_div


@dataclass
class Prefix:
    """A beginning that prompts share.

    Attributes:
        tokens: Its ids.
        cache: Has read it.
        row: Where decoding texts are, it keeps what they share.
    """

    tokens: list[int]
    cache: KimiLinearCache
    row: int

    def begins(self, tokens: list[int]) -> bool:
        """Whether a text begins with it and goes on."""
        return len(tokens) > len(self.tokens) and tokens[: len(self.tokens)] == self.tokens


class Reading:
    """Texts that are read into a cache each, end to end and piece by piece.

    Args:
        model: Reads them.
        texts: Their tokens.
        most_tokens: Of a piece.
        prefix: What all of them begin with, which is read.
        states: The requests whose prompts they are; none for a prefix.

    Attributes:
        caches: Of the texts.
        piece_tokens: Of a piece, but for the last.
    """

    def __init__(
        self,
        model: Any,
        texts: list[list[int]],
        most_tokens: int,
        prefix: Prefix | None = None,
        states: Sequence[Any] = (),
    ) -> None:
        self.model, self.texts, self.prefix, self.states = model, texts, prefix, list(states)
        start = 0 if prefix is None else len(prefix.tokens)
        rests = [text[start:] for text in texts]
        self._ids = torch.tensor([list(itertools.chain(*rests))]).to(model.device)
        self._ends = torch.tensor([0, *map(len, rests)]).cumsum(0)
        self.piece_tokens = ceil_div(self._ids.numel(), ceil_div(self._ids.numel(), most_tokens))
        self._done = 0
        self._last: list[Tensor] = []  # [texts, D]: of the texts that are read, the last tokens
        self.caches = [
            KimiLinearCache(model.config, rollback_tokens=0, reserve_tokens=len(rest))
            if prefix is None
            else prefix.cache.fork()
            for rest in rests
        ]

    def again(self, most_tokens: int) -> "Reading":
        """The same from its beginning, in smaller pieces."""
        return Reading(self.model, self.texts, most_tokens, self.prefix, self.states)

    @property
    def is_done(self) -> bool:
        """Whether all is read."""
        return self._done == self._ids.numel()

    def lengths(self) -> list[int]:
        """Of the texts that will go on from here, with their first new tokens."""
        if not self.states:
            return [len(text) for text in self.texts]
        return list(itertools.chain(*map(first_lengths, self.states)))

    def read(self) -> None:
        """Read a piece, layer by layer: its number of tokens will hardly come again."""
        start, stop = self._done, min(self._done + self.piece_tokens, self._ids.numel())
        out = self.model.model(
            input_ids=self._ids[:, start:stop],
            cu_seq_lens_q=self._ends.clamp(start, stop) - start,
            cache=self.caches,
        )
        ends = self._ends[1:]
        ended = ends[(ends > start) & (ends <= stop)] - 1 - start
        hidden = out.last_hidden_state[0]
        self._last.append(hidden[ended.to(hidden.device, non_blocking=True)])
        self._done = stop

    def logits(self) -> Tensor:
        """[texts, vocab_size] of the last tokens, once all is read."""
        return self.model.lm_head(torch.cat(self._last))


def prompt_length(state: Any) -> int:
    """Tokens of a request's prompt."""
    return len(state.initial_tokens)


def first_lengths(state: Any) -> list[int]:
    """Of the texts that go on from a request's prompt, with their first new tokens."""
    return [prompt_length(state) + 1] * (1 + state.num_children)
