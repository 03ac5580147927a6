"""What the models return.

Transformers calls an output's cache `past_key_values` up to 5.23 and `cache` from 5.24 on, and its
loops ask for it by one of these names. The field here is `cache`; `past_key_values` reads and
writes the same field, as attribute and as key, on every version and without a warning.

Shapes: B batch, T tokens, D hidden size, N = B * T, E experts.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache given under either name.

    Raises:
        ValueError: If both are given and are not the same object.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError(
        "cache and past_key_values are two different caches, which is not allowed: they are two "
        "names of one argument, pass one of them"
    )


class BothCacheNames(ModelOutput):
    """A `ModelOutput` whose keys `cache` and `past_key_values` are one field."""

    _cache_field: ClassVar[str] = "cache"

    @classmethod
    def _key(cls, key: Any) -> Any:
        return cls._cache_field if key in CACHE_NAMES else key

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._key(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._key(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self._key(name), value)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._key(key))

    def get(self, key: Any, default: Any = None) -> Any:
        """The value under `key`, or `default` where there is none."""
        return super().get(self._key(key), default)


class OutputWithCache(BothCacheNames):
    """An output with a field `cache`."""

    @property
    def past_key_values(self) -> Any:
        """Older name of `cache`."""
        return self.cache  # type: ignore[attr-defined]


@functools.cache
def _with_cache(kind: type) -> type:
    """A subclass of an output class of Transformers up to 5.23 that has `cache` too."""

    def reduce(self: Any) -> Any:  # by the class that a pickle can name
        return _rebuilt, (kind, dict(self))

    own = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce__": reduce,
        "_cache_field": "past_key_values",
        "cache": property(lambda self: self.past_key_values),
    }
    return type(kind.__name__, (BothCacheNames, kind), own)


def _rebuilt(kind: type, fields: dict[str, Any]) -> Any:
    return answering_both(kind(**fields))


def answering_both(output: Any) -> Any:
    """What `generate()` returned, so that it answers to `cache` before Transformers 5.24 too."""
    if isinstance(output, ModelOutput) and not hasattr(output, "cache"):
        output.__class__ = _with_cache(type(output))  # type: ignore[arg-type]
    return output


@dataclass
class KimiLinearModelOutput(OutputWithCache):
    """The backbone's outputs.

    Attributes:
        last_hidden_state: [B, T, D], normed.
        cache: The cache that holds this call's tokens; None without one.
        hidden_states: On request, [B, T, D] each: the embeddings and what each layer returns.
        attentions: On request, of the MLA layers, [B, H, T, S]; "eager" attention only.
        router_logits: On request, of the MoE layers, [N, E] each.
        router_losses: [2], balance loss and z-loss, each the sum over the layers and the mean over
            the sequences, without its coefficient. None where nothing asked for them.
        router_losses_by_place: [N, 2], each place's part of its sequence's losses; [N], the number
            of its sequence, S at padding; [S], the sequences' lengths.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_losses: Tensor | None = None
    router_losses_by_place: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass
class KimiLinearCausalLMOutput(OutputWithCache):
    """The language model's outputs.

    Attributes:
        loss: Scalar, with `labels`.
        logits: [B, kept, vocab_size]; in training `DeferredLogits`, see `loss_backend`.
        cache, hidden_states, attentions, router_logits: The backbone's.
        aux_loss: Balance loss without its coefficient, where it was computed.
    """

    loss: Tensor | None = None
    logits: Any = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


@dataclass
class KimiLinearSequenceClassifierOutput(OutputWithCache):
    """The sequence classifier's outputs.

    Attributes:
        loss: Scalar, with `labels`.
        logits: [B, num_labels].
        cache, hidden_states, attentions: The backbone's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
