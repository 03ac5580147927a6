"""`generate()`: which cache it is given, and whether each of its steps reads the right tokens."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import (
    CandidateGenerator,
    GenerationMixin,
    PromptLookupCandidateGenerator,
)

from kimi_linear.outputs_kimi_linear import answering_both, one_cache
from kimi_linear.upstream.caches import CACHE_NAME
from kimi_linear.upstream.late_stop import late_sample
from kimi_linear.upstream.lookup_call import LookupCall, lookup_call
from kimi_linear.upstream.releases import versions

__all__ = ["CandidateGenerator", "GenerationHooks", "PromptLookupCandidateGenerator"]


class LoopWatch:
    """Follows one `generate()` from step to step: each has to read all of the text that its cache
    has not, no more and no less, and to go on with the same cache; in beam search, with its rows
    in the beams' order.

    A loop that renames what it hands on would lose the cache without a word, and each step would
    be a text of one token.

    Args:
        model: Whose `generate()` it is.
        is_own_loop: Whether the loop is one that the caller has brought along, which may go on with
            any cache that has read its text.
    """

    def __init__(self, model: Any = None, is_own_loop: bool = False) -> None:
        self.model, self.is_own_loop = model, is_own_loop
        self.cache: Any = None
        self.steps = self.total = self.width = self.reorders = 0
        self.has_beams = self.has_drafts = False
        self.offset: int | None = None  # tokens of the text that its ids do not show
        self.drafted_from: int | None = None  # the text's tokens, where drafts begin behind it

    def step(self, cache: Any, width: int, new: int, *, uses_cache: bool) -> None:
        """Check what one step is about to read.

        Args:
            cache: What it was handed, or None.
            width: Columns of the ids that the loop has: the text's, or a piece of the prompt's.
            new: Tokens that the step reads.
            uses_cache: Whether the loop keeps a cache.

        Raises:
            RuntimeError: If the step would read the wrong tokens.
        """
        past = 0 if cache is None else cache.get_seq_length()
        is_piece = self.steps > 0 and new == width <= self.width
        if self.steps:
            if cache is None and uses_cache:
                self._refuse("without the cache that the first one returned")
            if self.is_own_loop:
                return
            if self.cache is not None and cache is not self.cache:
                self._refuse("with another cache than the first one")
            known = self.offset is not None and not is_piece
            expected = width + (self.offset or 0) - new if known else self.total
            # PEFT's prompt tuning puts tokens of its own before the prompt, unseen by the loop
            has_prefix = self.steps == 1 and past > expected and new == width - self.width
            # a process whose rows have ended repeats its last step while others go on
            repeats = width == self.width and not is_piece
            if past != expected and not has_prefix and not repeats:
                self._refuse(f"with {past} tokens in its cache, where {expected} come before it")
        reorders = getattr(cache, "num_reorders", 0)
        if self.has_beams and self.cache is not None and not is_piece:
            if reorders == self.reorders:
                self._refuse("with the rows of its cache in the order of the step before")
        self.reorders = reorders
        # pieces of a prompt do not say how the loop counts
        self.offset = None if is_piece else past + new - width
        self.cache, self.total, self.width = cache, past + new, width
        self.steps += 1

    def _refuse(self, how: str) -> None:
        raise RuntimeError(
            f"generate() made step {self.steps + 1} {how}: its text would be wrong. {versions()}. "
            "Another version, or use_cache=False, helps"
        )


_watch: ContextVar[LoopWatch | None] = ContextVar("kimi_linear_loop_watch", default=None)


@contextmanager
def _watching(watch: LoopWatch) -> Iterator[None]:
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


# What the loop hands to each step though no forward reads it: `generate(stop_strings=...)`.
LOOP_ARGUMENTS = ("tokenizer", "assistant_tokenizer")


# The arguments of `generate()` that can hold the prompt.
PROMPTS = ("inputs", "input_ids", "inputs_embeds")


class GenerationHooks(GenerationMixin):
    """`generate()` under both names of the cache, watched, with methods of our own for what it
    does inside."""

    @functools.wraps(GenerationMixin.generate)
    def generate(
        self, *args: Any, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        cache = one_cache(cache, past_key_values)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        given = {"inputs": args[0] if args else None, **kwargs}
        # 5.17: assisted decoding marks the settings of its drafts
        is_draft = bool(getattr(kwargs.get("generation_config"), "is_assistant", False))
        prompts = {name: given.get(name) for name in PROMPTS}
        self.check_prompt(prompts, given.get("attention_mask"), is_draft=is_draft)
        watch = LoopWatch(self, callable(kwargs.get("custom_generate")))
        try:
            with _watching(watch):
                return answering_both(super().generate(*args, **kwargs))
        except BaseException:
            if watch.has_drafts and watch.steps and hasattr(cache, "is_torn"):
                cache.is_torn = True  # drafted tokens are in it that nobody has accepted
            raise

    # 5.17: the only place where a model can give the loop a cache of its own.
    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        self.check_generation(generation_config, model_kwargs)
        watch = _watch.get()
        if watch is not None:
            watch.has_beams = "beam" in generation_mode
            watch.has_drafts = "assisted" in generation_mode
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache:
            longest = max(max_cache_length, getattr(generation_config, "max_cache_len", 0) or 0)
            model_kwargs[CACHE_NAME] = self.new_cache(
                generation_config.cache_implementation,
                longest,
                is_returned=generation_config.return_dict_in_generate,
                is_draft=generation_config.is_assistant,
                is_compiled=generation_config.compile_config is not None,
            )
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def step_inputs(self, input_ids: Tensor, cache: Any, **kwargs: Any) -> dict[str, Any]:
        """Transformers' `prepare_inputs_for_generation`, which names the cache by its version."""
        return super().prepare_inputs_for_generation(input_ids, **{CACHE_NAME: cache}, **kwargs)

    def watch_step(self, inputs: dict[str, Any], width: int) -> dict[str, Any]:
        """A step's inputs, checked if `generate()` is what asks for them; see `LoopWatch`. PEFT's
        prompt tuning (0.21) looks for the cache by its older name in them."""
        cache = one_cache(inputs.pop("cache", None), inputs.pop("past_key_values", None))
        watch = _watch.get()
        if watch is not None and watch.model is self:
            ids = inputs.get("input_ids")
            read = inputs["inputs_embeds"] if ids is None else ids
            uses_cache = bool(inputs.get("use_cache", True))
            watch.step(cache, width, read.shape[1], uses_cache=uses_cache)
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    # 5.17: the loop of drafts; `decode_by_lookup` takes its place where that knows what is asked.
    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = None if args else lookup_call(input_ids, **kwargs)
        if call is not None:
            drafts: Any = self._get_candidate_generator(
                call.config, input_ids, input_ids, call.processors, call.of_forwards
            )
            return call.answer(self.decode_by_lookup(call, drafts))
        watch = _watch.get()
        if watch is not None:  # its first step reads the text and a draft at once
            watch.drafted_from = input_ids.shape[1]
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    # 5.17: who drafts for the loop of assisted decoding.
    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        return self.candidates(super()._get_candidate_generator(*args, **kwargs))

    def candidates(self, generator: Any) -> Any:
        """What drafts in the place of Transformers' generator; the model's class knows."""
        raise NotImplementedError

    def decode_by_lookup(self, call: LookupCall, drafts: Any) -> Tensor:
        """The whole text [1, S]; the model's class knows how."""
        raise NotImplementedError

    def drafted_from(self) -> int | None:
        """Tokens of the text that assisted decoding began with; None in other loops."""
        watch = _watch.get()
        return watch.drafted_from if watch is not None and watch.model is self else None

    # 5.17: the loop of greedy search and sampling, run with a check of our own, see `late_sample`.
    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        late = None if kwargs.get("synced_gpus") else late_sample()
        return super()._sample(*args, **kwargs) if late is None else late(self, *args, **kwargs)

    def check_prompt(self, prompts: dict[str, Any], attention_mask: Any, *, is_draft: bool) -> None:
        """Raise ValueError for what the model cannot go on with, by the argument's name."""
        raise NotImplementedError

    def check_generation(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Refuse what cannot be done; the model's class knows."""
        raise NotImplementedError

    def new_cache(
        self,
        kind: str | None,
        max_tokens: int,
        *,
        is_returned: bool,
        is_draft: bool,
        is_compiled: bool,
    ) -> Cache:
        """A cache for a call of `generate()` that was given none; the model's class makes it.

        Args:
            kind: `cache_implementation`.
            max_tokens: The most that it will hold.
            is_returned: Whether the caller gets it.
            is_draft: Whether the model drafts for another one, which takes tokens back.
            is_compiled: Whether `compile_config` is given.
        """
        raise NotImplementedError
