"""Transformers' continuous batching: its manager, with the thread, the queues and the outputs that
`generate_batch()`, `transformers serve` and callers know, over a processor of our own.

Its own processor keeps keys and values of attention layers in pages, and refuses models that have
layers of another kind.
"""

import copy
from typing import Any

from transformers import ContinuousBatchingConfig
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.requests import RequestStatus

from kimi_linear.upstream.renaming import with_names

__all__ = ["PAGE_SIZE", "RequestHooks", "RequestManager", "RequestStatus", "drained"]
RESOLVE, MANAGER = "resolve_continuous_batching_config", "ContinuousBatchingManager"
# the setting for tokens of a page, which 5.17 calls otherwise
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
_Manager: Any = continuous_api.ContinuousBatchingManager


def _resolved(*, cb_config: Any, workload_hints: Any = None, **_: Any) -> Any:
    """The configuration as it was given: what Transformers decides depends on kinds of attention.
    Hints say how many requests there are."""
    cb_config = copy.deepcopy(cb_config)
    hinted = getattr(workload_hints, "num_requests", 0)
    if cb_config.max_requests_per_batch is None and hinted:
        cb_config.max_requests_per_batch = hinted
    return cb_config


class RequestManager(_Manager):
    """`ContinuousBatchingManager` whose processor the model makes."""

    __init__ = with_names(_Manager.__init__, **{RESOLVE: _resolved})

    def switch_to_cb_friendly_attn(self, *args: Any, **kwargs: Any) -> None:
        """Attention stays what it is: pages are read by kernels of ours."""

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is None:
            return self.model.request_processor(self)
        self.batch_processor.reset()
        return self.batch_processor


def drained(queue: Any) -> list[Any]:
    """What a queue holds now."""
    found = []
    while not queue.empty():
        found.append(queue.get_nowait())
    return found


class RequestHooks(GenerationMixin):
    """Continuous batching by `RequestManager`."""

    init_continuous_batching = with_names(
        GenerationMixin.init_continuous_batching.__wrapped__,  # type: ignore[attr-defined]
        **{MANAGER: RequestManager},
    )

    def request_processor(self, manager: Any) -> Any:
        """What runs a manager's requests; the model's class makes it."""
        raise NotImplementedError
