"""What Kimi Linear does differently in `generate()`: which cache it gets, and what it refuses."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

from kimi_linear.cache.hybrid import KimiLinearCache, KimiLinearDynamicCache
from kimi_linear.cache.kda import ROLLBACK_TOKENS
from kimi_linear.cache.pending import STEP_TOKENS
from kimi_linear.cache.sessions import Session, load_session, read_session, save_session
from kimi_linear.cache.static import KimiLinearStaticCache, is_compileable
from kimi_linear.generation.lookup import PromptLookup
from kimi_linear.generation.lookup_loop import LookupLoop
from kimi_linear.generation.requests import RequestProcessor
from kimi_linear.inputs.checks import check_source
from kimi_linear.inputs.layout import last_real_columns
from kimi_linear.outputs_kimi_linear import one_cache
from kimi_linear.upstream.caches import CACHE_NAME
from kimi_linear.upstream.generation import (
    LOOP_ARGUMENTS,
    GenerationHooks,
    PromptLookupCandidateGenerator,
)
from kimi_linear.upstream.lookup_call import LookupCall
from kimi_linear.upstream.requests import RequestHooks

logger = logging.get_logger(__name__)

CACHE_IMPLEMENTATIONS = (None, "dynamic", "static", "offloaded", "offloaded_static")
# what `generate()` hands to every step, without effect on one token behind a cache
DECODE_ARGUMENTS = {"position_ids", "logits_to_keep", "use_cache"}


class KimiLinearGenerationMixin(RequestHooks, GenerationHooks):
    """`GenerationMixin` with the hybrid cache."""

    def check_prompt(self, prompts: dict[str, Any], attention_mask: Any, *, is_draft: bool) -> None:
        """Refuse prompts that are no rows of tokens, and those above the limit before any of it is
        read. Ids beside embeddings may be none, and a draft's hold what was generated so far."""
        limit = None if is_draft else self.config.max_prompt_tokens
        # of the new tokens alone, the mask has the columns of all
        columns = attention_mask.shape[-1] if isinstance(attention_mask, Tensor) else 0
        if prompts.get("inputs_embeds") is not None:
            prompts = {"inputs_embeds": prompts["inputs_embeds"]}
        for name, prompt in prompts.items():
            if prompt is not None:
                check_source(prompt, name)
                count = max(prompt.shape[1], columns)
                if limit is not None and count > limit:
                    raise ValueError(
                        f"{name} has {count} tokens, cached ones included, which is not allowed: "
                        f"it must have at most max_prompt_tokens={limit}, a field of config.json"
                    )

    def check_generation(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Refuse what this model cannot generate with."""
        _check_cache_implementation(generation_config.cache_implementation)
        cache = model_kwargs.get(CACHE_NAME)
        self._check_right_padding(generation_config, model_kwargs, cache)
        self._check_compilation(generation_config, cache)
        if self.training and self.model.gradient_checkpointing:
            generation_config.use_cache = model_kwargs["use_cache"] = False

    def _check_right_padding(
        self, generation_config: Any, model_kwargs: dict[str, Any], cache: Any
    ) -> None:
        """Have rows whose last column is padding go on from their last real token."""
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is None or mask.ndim != 2 or not bool((mask[:, -1:] == 0).any()):
            return
        _check_rows(mask[:, 0 if cache is None else cache.get_seq_length() :])
        if positions is not None:  # they go on from the last column: let it be a real token's
            columns = last_real_columns(mask[:, -positions.shape[1] :] != 0)
            model_kwargs["position_ids"] = positions.expand_as(columns).gather(1, columns)
        # the last piece need not hold each row's last token
        _read_at_once(generation_config, "on right-padded prompts")

    def _check_compilation(self, generation_config: Any, cache: Any) -> None:
        """Say where `compile_config` has no effect, and where pieces of prompts have none."""
        kind = "static" if is_compileable(cache) else generation_config.cache_implementation
        is_compiled = generation_config.compile_config is not None
        if not self._compiles_steps(kind):
            if is_compiled:
                logger.warning_once(
                    "compile_config has no effect: it needs cache_implementation='static', and on "
                    "a GPU decode_backend='eager', since decoding replays one CUDA graph there"
                )
        elif is_compiled or is_compileable(cache):  # of pieces, it would compile the first too
            _read_at_once(generation_config, "with compile_config")

    def _compiles_steps(self, kind: str | None) -> bool:
        """Whether `generate(compile_config=...)` compiles steps behind this kind of cache."""
        has_graph = self.device.type == "cuda" and self.decode_backend != "eager"
        return kind == "static" and not has_graph

    def new_cache(
        self,
        kind: str | None,
        max_tokens: int,
        *,
        is_returned: bool,
        is_draft: bool,
        is_compiled: bool,
    ) -> KimiLinearCache:
        """A cache that can be cropped if someone will be able to: it is returned, or a draft's.
        For the model that checks drafts Transformers turns it on later."""
        kind = kind or ""
        rollback_tokens, offload = ROLLBACK_TOKENS if is_returned else 0, "offloaded" in kind
        cache: KimiLinearCache
        if "static" in kind:
            cache = KimiLinearStaticCache(
                self.config,
                max_tokens,
                rollback_tokens=rollback_tokens,
                offload=offload,
                is_compileable=is_compiled and not is_draft and self._compiles_steps(kind),
            )
        else:
            cache = KimiLinearDynamicCache(
                self.config, rollback_tokens=rollback_tokens, offload=offload
            )
        if is_draft:
            cache.activate_past_recording()
        return cache

    def candidates(self, generator: Any) -> Any:
        """Drafts from the text in numbers that pay, in the place of Transformers'."""
        if not isinstance(generator, PromptLookupCandidateGenerator):
            return generator
        return PromptLookup(
            min(generator.num_output_tokens, STEP_TOKENS - 1),
            generator.max_matching_ngram_size,
            generator.max_length,
            generator.eos_token_id,
        )

    def decode_by_lookup(self, call: LookupCall, drafts: Any) -> Tensor:
        """The whole text, see `LookupLoop`."""
        return LookupLoop(self, call, drafts).run()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As usual, but a decode step without padding gets what it needs and nothing else: to look
        into a mask, the host would have to wait for the device.

        Raises:
            ValueError: If the prompt has no token that the cache has not.
            RuntimeError: In `generate()`, if the loop has lost its cache.
        """
        cache = one_cache(cache, past_key_values)
        kwargs = {name: x for name, x in kwargs.items() if name not in LOOP_ARGUMENTS}
        if is_first_iteration:
            next_sequence_length = self._unread(
                input_ids, inputs_embeds, cache, next_sequence_length
            )
        is_next_token = not is_first_iteration and _is_next_token(input_ids, cache)
        if is_next_token:
            attention_mask = None
        if is_next_token and DECODE_ARGUMENTS.issuperset(
            n for n, x in kwargs.items() if x is not None
        ):
            # a single row would keep the strides of all the text without a copy, and a compiler
            # would make each step a graph of its own
            last = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
            inputs: dict[str, Any] = {"input_ids": last, "cache": cache}
        else:
            inputs = self.step_inputs(
                input_ids,
                cache,
                next_sequence_length=next_sequence_length,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )
        if is_compileable(cache):
            cache.fit_step(inputs, attention_mask, is_first=bool(is_first_iteration))
        return self.watch_step(inputs, input_ids.shape[1])

    def _unread(
        self, input_ids: Tensor, inputs_embeds: Tensor | None, cache: Any, count: int | None
    ) -> int | None:
        """How many tokens the first step of a loop reads; None: as Transformers thinks."""
        name, prompt = "input_ids", input_ids
        if inputs_embeds is not None:
            name, prompt = "inputs_embeds", inputs_embeds
        num_tokens, begun = prompt.shape[1], self.drafted_from()
        if begun and name == "input_ids" and cache is not None:
            past = cache.get_seq_length()
            _check_unread(name, begun, past)
            # Transformers would read the whole text, whatever the cache holds
            return num_tokens - past if past else count
        if count is not None:
            # Transformers would take a slice of [-left:], which may be the whole prompt once more
            _check_unread(name, num_tokens, num_tokens - count)
        return count

    def save_session(
        self, path: str | os.PathLike[str], cache: Cache, input_ids: Tensor | None = None
    ) -> None:
        """Write a cache of this model to a file, see `sessions.save_session`."""
        save_session(path, cache, self, input_ids)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Read a file of `save_session`, see `sessions.load_session`."""
        return load_session(path, self)

    def read_session(self, path: str | os.PathLike[str], input_ids: Tensor) -> KimiLinearCache:
        """A cache for `generate(input_ids)`, from a file as far as it goes, see
        `sessions.read_session`."""
        return read_session(path, self, input_ids)

    def request_processor(self, manager: Any) -> RequestProcessor:
        """What runs the requests of `generate_batch()` and of a continuous-batching manager."""
        return RequestProcessor(self, manager)


def _is_next_token(input_ids: Tensor, cache: Any) -> bool:
    """Whether a step reads one token of each row behind a cache without padding. The last token of
    a text is real: the prompt's is checked, others were generated."""
    layers = getattr(cache, "layers", None)
    if not layers or getattr(layers[0], "has_padding", True) is not False:
        return False
    past = layers[0].num_tokens
    return bool(past) and input_ids.shape[1] == past + 1


def _check_cache_implementation(kind: str | None) -> None:
    if kind == "quantized":
        raise ValueError(
            "cache_implementation='quantized' is not supported: Transformers' quantised caches "
            "take keys and values of attention layers only"
        )
    if kind not in CACHE_IMPLEMENTATIONS:
        raise ValueError(
            f"cache_implementation={kind!r} is not supported: it must be one of "
            f"{CACHE_IMPLEMENTATIONS}"
        )


def _read_at_once(generation_config: Any, where: str) -> None:
    if generation_config.prefill_chunk_size is not None:
        logger.warning_once(f"prefill_chunk_size has no effect {where}")
        generation_config.prefill_chunk_size = None


def _check_unread(name: str, count: int, past: int) -> None:
    """ValueError unless a text of `count` tokens is longer than what is cached."""
    if count <= past:
        raise ValueError(
            f"{name} has {count} tokens and cache {past}, which is not allowed: {name} must be the "
            "whole text, at least one token longer than what is cached (cache.crop(-1) takes the "
            "last one back); or, without drafts, the new tokens alone, with an attention_mask of "
            "all columns"
        )


def _check_rows(new_mask: Tensor) -> None:
    """ValueError if a row of `new_mask` [B, T] is padding alone: nothing says how it goes on."""
    empty = (new_mask == 0).all(dim=1)
    if bool(empty.any()):
        raise ValueError(
            f"attention_mask has no token of row {int(empty.int().argmax())} that the cache has "
            "not, which is not allowed in generate(): each row must have one"
        )
