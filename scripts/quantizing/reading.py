"""Tensors on their way from files: read by several threads, a bounded number of bytes ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_linear.checkpoints.files import StoredBlock
from quantizing.plan import Shard, Source

THREADS = 8
# Of one kind, worked on together: long enough for a GPU.
BATCH_BYTES = 96 << 20
# What one thread reads at once.
PART_BYTES = 16 << 20


@dataclass(frozen=True)
class Batch:
    """Sources of one kind, and their numbers [len(sources), ..], on the CPU."""

    shard: Shard
    sources: tuple[Source, ...]
    numbers: Tensor


def read_ahead(shards: Iterable[Shard], limit: int, *, is_pinned: bool) -> Iterator[Batch]:
    """Read tensors in their order, while the caller works on those before.

    Args:
        shards: What to read.
        limit: Bytes that are held at once, the caller's batch included, which it forgets before it
            asks for the next; a batch that is larger is read alone.
        is_pinned: Whether into memory that a GPU copies from by itself.

    Raises:
        OSError: A file cannot be read, or has become shorter; the message names it.
    """
    pending: deque[tuple[Batch, list[Future[None]]]] = deque()
    held = 0
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            batches = _batches(shards, min(BATCH_BYTES, max(1, limit // 3)))
            coming = next(batches, None)
            while coming or pending:
                while coming and (not pending or held + _size(coming[1]) <= limit):
                    held += _size(coming[1])
                    pending.append(_begin(*coming, pool, is_pinned))
                    coming = next(batches, None)
                batch, parts = pending.popleft()
                while parts:
                    parts.pop().result()
                size = batch.numbers.nbytes
                yield batch
                del batch
                held -= size
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(shards: Iterable[Shard], limit: int) -> Iterator[tuple[Shard, tuple[Source, ...]]]:
    """Neighbours of one kind that are to have few bits, together; others alone."""
    for shard in shards:
        batch: list[Source] = []
        for source in shard.sources:
            is_alike = batch and source.scheme is not None and source.kind == batch[0].kind
            if batch and not (is_alike and _size(batch) + source.block.size <= limit):
                yield shard, tuple(batch)
                batch = []
            batch.append(source)
        if batch:
            yield shard, tuple(batch)


def _size(sources: Iterable[Source]) -> int:
    return sum(source.block.size for source in sources)


def _begin(
    shard: Shard, sources: tuple[Source, ...], pool: ThreadPoolExecutor, is_pinned: bool
) -> tuple[Batch, list[Future[None]]]:
    shape = (len(sources), *sources[0].block.shape)
    numbers = torch.empty(shape, dtype=sources[0].dtype, pin_memory=is_pinned)
    memory = numbers.view(-1).view(torch.uint8).numpy().data if numbers.numel() else memoryview(b"")
    parts, place = [], 0
    for source in sources:
        for start in range(0, source.block.size, PART_BYTES):
            size = min(PART_BYTES, source.block.size - start)
            target = memory[place + start : place + start + size]
            parts.append(pool.submit(_read, source.block, start, target))
        place += source.block.size
    return Batch(shard, sources, numbers), parts


def _read(block: StoredBlock, start: int, target: memoryview) -> None:
    """Fill `target` with a block's bytes from `start` on."""
    done = 0
    with open(block.path, "rb", buffering=0) as file:
        file.seek(block.start + start)
        while done < len(target):
            count = file.readinto(target[done:])
            if not count:
                end = block.start + start + done
                raise OSError(f"{block.path}: ends at byte {end}, inside a tensor")
            done += count
