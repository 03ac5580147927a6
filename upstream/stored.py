"""Checkpoints that are quantised already: this package reads them, not Transformers' quantisers,
which need further packages and expand fused experts.

Transformers picks a quantiser by the `quant_method` of `config.quantization_config`, a dict. While
`from_pretrained` of these models runs, the dict is wrapped in one with a method of ours, under
which `quantizers.py` registers `StoredQuantization`. A configuration by which no model is loaded
stays as `config.json` has it.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from kimi_linear.configuration_quantization import QUANT_METHOD

STORED = "kimi_linear_stored"
READ = ("compressed-tensors", "fp8")
# Transformers' own quantisers, which leave experts as they are in the released checkpoints.
LEFT_ALONE = (QUANT_METHOD, STORED, "bitsandbytes", "torchao", "quanto", "hqq")


class StoredQuantization(QuantizationConfigMixin):
    """What a checkpoint says about how its weights are held.

    Args:
        stored: The entry `quantization_config` of its `config.json`.
    """

    def __init__(self, stored: dict[str, Any], quant_method: str = STORED) -> None:
        self.stored = stored
        self.quant_method = quant_method  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """The entry again."""
        return copy.deepcopy(self.stored)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def is_stored(config: Any) -> bool:
    """Whether a quantisation is that of a checkpoint that this package reads; another copy of this
    code may have made the object."""
    return getattr(config, "quant_method", None) == STORED


def entry_of(config: Any) -> dict[str, Any] | None:
    """The entry of a checkpoint's configuration if this package reads what it says."""
    entry: Any = getattr(config, "quantization_config", None)
    is_read = isinstance(entry, Mapping) and entry.get("quant_method") in READ
    return dict(entry) if is_read else None


def is_described(config: Any) -> bool:
    """Whether an entry, object or dict, says how this package holds weights."""
    is_entry = isinstance(config, Mapping)
    method = config.get("quant_method") if is_entry else getattr(config, "quant_method", None)
    return method in (*READ, STORED, QUANT_METHOD)


_is_loading: ContextVar[bool] = ContextVar("kimi_linear_is_loading", default=False)


class ReadsStored:
    """Base of a configuration: what a loading model reads is wrapped."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As any configuration's."""
        found = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        if _is_loading.get():
            wrap_stored(found[0] if isinstance(found, tuple) else found)
        return found


@contextmanager
def wrapping_stored(kwargs: dict[str, Any]) -> Iterator[None]:
    """Within, `from_pretrained(**kwargs)` finds configurations wrapped."""
    if hasattr(kwargs.get("config"), "to_dict"):
        kwargs["config"] = copy.deepcopy(kwargs["config"])
        wrap_stored(kwargs["config"])
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)


def wrap_stored(config: Any) -> None:
    """Wrap a configuration's entry, if it is of a checkpoint that is quantised.

    Raises:
        ValueError: For a method that nobody reads into these models.
    """
    entry: Any = getattr(config, "quantization_config", None)
    if is_stored(entry):
        entry = entry.to_dict()  # of a model that was loaded before
    if not isinstance(entry, Mapping):
        return
    method = entry.get("quant_method")
    is_bitsandbytes = entry.get("load_in_4bit") or entry.get("load_in_8bit")
    if method in READ:
        config.quantization_config = {"quant_method": STORED, "stored": dict(entry)}
    elif method not in LEFT_ALONE and not is_bitsandbytes:
        raise ValueError(
            f"quantization_config.quant_method={method!r} is not allowed: it must be one of "
            f"{', '.join(READ)}"
        )
