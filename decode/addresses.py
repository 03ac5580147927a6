"""Where a cache's tensors lie, as the decode step's kernels read it from a table on the device.

Shapes: B rows, H heads, K key and value size of KDA, W taps, R latent width, D hidden size.
"""

import weakref
from operator import call, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kimi_linear.cache.pool import TextPool
from kimi_linear.ops.runtime import tl

# Columns of a row. Rows start at multiples of 16 bytes, or Triton recompiles.
TABLE_COLUMNS = 8


class KDAAddresses(NamedTuple):
    """A KDA layer's row. Strides count numbers, not bytes."""

    conv_state: int = 0  # [B, 3, H * K, W - 1]
    recurrent_state: int = 0  # float32 [B, H, K, K]
    log: int = 0  # [B, capacity, D], see `rollback.py`; 0: nothing is logged
    log_stride: int = 0  # of a row
    updates: int = 0  # float32 [B, C, 3, H * K], see `pending.py`; 0: states take all in at once
    inputs: int = 0  # [B, C, 3, H * K]
    capacity: int = 1  # C, a power of two


class LatentAddresses(NamedTuple):
    """An MLA layer's row: the latents of the first tokens, and those with room for new ones."""

    prefix: int = 0  # [B or 1, prefix_tokens, R]
    prefix_tokens: int = 0
    prefix_stride: int = 0  # of a row; 0 if all rows share one
    tail: int = 0  # [B, capacity, R]; of a pool [pages, PAGE_TOKENS, R]
    tail_stride: int = 0
    pages: int = 0  # int32 [rows, pages_stride], of a pool: which of its pages a row has, in order
    pages_stride: int = 0


def columns(kind: Any) -> list[Any]:
    """The columns of a row's fields, for kernels to name them."""
    places = range(len(kind._fields))
    return [place if tl is None else tl.constexpr(place) for place in places]


class Counters(NamedTuple):
    """What a step knows of a sequence."""

    cached: int = 0  # tokens before the step
    logged: int = 0  # of them, those in KDA layers' logs
    pending: int = 0  # of them, the last ones, which KDA states have not taken in
    row: int = 0  # of the cache


CACHED, LOGGED, PENDING, ROW = columns(Counters)
COUNTERS = len(Counters._fields) if tl is None else tl.constexpr(len(Counters._fields))


def is_kda(layer: Any) -> bool:
    """Whether a cache layer is one of KDA."""
    return layer.kind == "linear_attention"


def counters(first: Any, kda: list[Any]) -> Counters:
    """A cache's, by its first layer and its KDA layers, which all hold the same tokens."""
    cached = first.num_tokens
    if not kda:
        return Counters(cached, cached)
    logged = kda[0].rollback.num_logged  # where nothing is logged, any number that a step counts on
    return Counters(cached, cached if logged is None else logged, kda[0].pending.count)


class AddressTable:
    """A cache's rows [layers, TABLE_COLUMNS], good as long as it holds the same tensors."""

    def __init__(self, cache: Cache, num_rows: int, num_tokens: int) -> None:
        addresses = [_addresses(layer, num_rows) for layer in cache.layers]
        self.rows = padded(addresses)
        self._refs = [weakref.ref(x) for x in _step_tensors(cache, num_rows, num_tokens) or []]
        self._is_inference = torch.is_inference_mode_enabled()  # decides what may be written to

    def is_current(self, cache: Cache, num_rows: int, num_tokens: int) -> bool:
        """Whether the next step, of `num_tokens` tokens a row, may use it."""
        if self._is_inference != torch.is_inference_mode_enabled():
            return False
        tensors = _step_tensors(cache, num_rows, num_tokens)
        if tensors is None or len(tensors) != len(self._refs):
            return False
        return all(map(is_, tensors, map(call, self._refs)))


class PoolTable:
    """A pool's rows, good as long as the pool is there."""

    def __init__(self, pool: TextPool) -> None:
        place, stride = pool.pages.data_ptr(), pool.pages.stride(0)
        found: dict[int, Any] = {}
        for i, state in pool.states.items():
            found[i] = KDAAddresses(*(x.data_ptr() for x in state.tensors()))
        for i, pending in pool.updates.items():
            updates, inputs = pending.tensors()
            found[i] = found[i]._replace(
                updates=updates.data_ptr(), inputs=inputs.data_ptr(), capacity=updates.shape[1]
            )
        for i, latents in pool.latents.items():
            found[i] = LatentAddresses(tail=latents.data_ptr(), pages=place, pages_stride=stride)
        self.rows = padded([found[i] for i in sorted(found)])


def prepare(
    cache: Cache, num_rows: int, num_tokens: int, dtype: torch.dtype
) -> AddressTable | None:
    """The table of a cache made ready for a step in place; None if that cannot be."""
    layers = sorted(cache.layers, key=is_kda)  # where latents refuse, KDA has reserved nothing
    if all(layer.prepare_step(num_rows, num_tokens, dtype) for layer in layers):
        return AddressTable(cache, num_rows, num_tokens)
    return None


def padded(addresses: list[Any]) -> list[list[int]]:
    """Rows of one length."""
    return [[*row, *[0] * (TABLE_COLUMNS - len(row))] for row in addresses]


def _step_tensors(cache: Cache, num_rows: int, num_tokens: int) -> list[Tensor] | None:
    """What a table depends on; None if a step in place cannot follow the last one."""
    found: list[Tensor] = []
    for layer in cache.layers:
        own = layer.step_tensors(num_rows, num_tokens)
        if own is None:
            return None
        found += [x for x in own if x is not None]
    return found


def _addresses(layer: Any, num_rows: int) -> KDAAddresses | LatentAddresses:
    if is_kda(layer):
        log, pending = layer.rollback.log, layer.pending
        found = KDAAddresses(layer.state.conv.data_ptr(), layer.state.recurrent.data_ptr())
        if log is not None:
            found = found._replace(log=log.data_ptr(), log_stride=log.stride(0))
        if pending.updates is None:
            return found
        places = pending.updates.data_ptr(), pending.inputs.data_ptr(), pending.updates.shape[1]
        return found._replace(**dict(zip(("updates", "inputs", "capacity"), places, strict=True)))
    prefix, tail = (0, 0, 0), layer.tail
    if layer.full:
        (first,) = layer.full
        stride = first.stride(0) if first.shape[0] == num_rows else 0
        prefix = first.data_ptr(), first.shape[1], stride
    return LatentAddresses(*prefix, tail.data_ptr(), tail.stride(0))
