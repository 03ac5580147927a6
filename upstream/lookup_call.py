"""What Transformers hands to its loop of drafts, for one of our own in its place.

Ours looks drafts up in the text itself, knows one text without padding, and gives out tokens and
cache alone.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from kimi_linear.upstream.caches import CACHE_NAME

# Arguments of Transformers' loop that have no effect on another; it hands the rest to each forward.
WITHOUT_EFFECT = {"inputs_tensor", "tokenizer"}
OF_FORWARDS = {CACHE_NAME, "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
# What `return_dict_in_generate` gives out besides tokens and cache.
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class LookupCall:
    """One call of a loop.

    Attributes:
        ids: [1, S], the text so far, or what of it the cache has not.
        cache: Which the loop goes on with.
        processors: Of logits.
        criteria: That end the text, but for those in `max_length` and `ends`.
        max_length: Tokens of the text, at most.
        ends: Tokens that end it.
        config: Of the generation.
        streamer: Takes tokens one by one, or None.
        of_forwards: What the prompt's forward is given.
    """

    ids: Tensor
    cache: Cache
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    max_length: int
    ends: set[int]
    config: GenerationConfig
    streamer: BaseStreamer | None
    of_forwards: dict[str, Any]

    def prefill(self, model: Any) -> Tensor:
        """Logits [1, 1, V] behind the text, after reading what of it the cache has not."""
        logits: Tensor = model._prefill(self.ids, self.config, self.of_forwards).logits
        return logits[:, -1:]

    def decoding(self, model: Any) -> AbstractContextManager[None]:
        """What Transformers makes other for steps than for prompts."""
        context: AbstractContextManager[None] = model._optimize_model_for_decode()
        return context

    def answer(self, ids: Tensor) -> Any:
        """What the loop returns for the text [1, S]."""
        if not self.config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(sequences=ids, **{CACHE_NAME: self.cache})


def lookup_call(
    ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **others: Any,
) -> LookupCall | None:
    """A call of Transformers' loop; None if it asks for what ours does not know."""
    given = {name for name, x in others.items() if x is not None and x is not False}
    mask, cache = others.get("attention_mask"), others.get(CACHE_NAME)
    of_forwards = {name: others[name] for name in OF_FORWARDS & others.keys()}
    is_known = (
        ids.shape[0] == 1
        and generation_config.prompt_lookup_num_tokens is not None
        and generation_config.assistant_early_exit is None
        and {CACHE_NAME, "use_cache"} <= given <= OF_FORWARDS | WITHOUT_EFFECT
        and not isinstance(cache, StaticCache)
        and (mask is None or bool((mask != 0).all()))
        and not (
            generation_config.return_dict_in_generate
            and any(getattr(generation_config, name) for name in OUTPUTS)
        )
    )
    if not is_known:
        return None
    rest, ends, lengths = StoppingCriteriaList(), set(), {generation_config.max_length}
    for each in stopping_criteria:
        if type(each) is EosTokenCriteria:
            ends.update(each.eos_token_id.flatten().tolist())
        elif type(each) is MaxLengthCriteria:
            lengths.add(each.max_length)
        else:
            rest.append(each)
    return LookupCall(
        ids,
        cache,
        logits_processor,
        rest,
        min(lengths),
        ends,
        generation_config,
        streamer,
        of_forwards,
    )
