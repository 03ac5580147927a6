"""`generate()` that asks one token late whether to stop, so that the device never waits for it.

After each token the host asks the device whether all rows have ended, and waits for the answer;
until then it queues nothing, and the device idles while the host prepares the next step.
Transformers knows the remedy, `DeferredStopCheck` (5.17), which reads the answer behind the next
step and takes that step back at the end; it uses it on "mps" only. Here it is used on CUDA too,
where that step can be taken back, or its cache is dropped anyway.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils

from kimi_linear.upstream.renaming import with_names

LATE_DEVICE_TYPES = ("cuda",)
STOP_CHECK = "DeferredStopCheck"
_Deferred: Any = getattr(generation_utils, STOP_CHECK, object)


class LateStopCheck(_Deferred):
    """`DeferredStopCheck` for caches of ours, which record what a crop needs by themselves."""

    def __init__(
        self,
        input_ids: Tensor,
        max_length: int,
        cache: Cache | None,
        cache_is_returned: bool,
        streamer: Any = None,
    ) -> None:
        super().__init__(input_ids, max_length, None, False, streamer)
        self.cache = cache if cache_is_returned else None

    @staticmethod
    def is_supported(
        device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool
    ) -> bool:
        """Whether a step can be taken back, or nobody will see that it was made."""
        if device.type not in LATE_DEVICE_TYPES or cache is None or is_assistant:
            return False
        return cache.is_croppable or not cache_is_returned


@functools.cache
def late_sample() -> Callable[..., Any] | None:
    """Transformers' `_sample` with this check; None if it asks in a way that is not known here.

    `_sample` finds the check's class by its global name alone, so this is its code with other
    globals; the class cannot be replaced in Transformers' module, where every model would get it.
    """
    sample: Any = GenerationMixin._sample
    code = getattr(sample, "__code__", None)
    if code is None or STOP_CHECK not in code.co_names:
        return None
    return with_names(sample, **{STOP_CHECK: LateStopCheck})
