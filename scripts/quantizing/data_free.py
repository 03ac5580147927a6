"""Snapshots brought to few bits without data, a batch of matrices at a time."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_linear.checkpoints.packed import packed_entries
from kimi_linear.ops.packed.rounding import check_finite, quantize
from quantizing.plan import Plan, Shard
from quantizing.reading import Batch, read_ahead
from quantizing.writing import TensorFile


def write_shards(
    plan: Plan, draft: Path, device: torch.device, read_bytes: int, progress: Any
) -> None:
    """Write the files that are not there yet.

    Args:
        plan: What to do.
        draft: The folder to write to.
        device: Where to compute.
        read_bytes: Bytes of weights that are read ahead.
        progress: A bar of the bytes to read, which is moved as they are done.
    """
    files = {shard.name: file_of(plan, shard, draft) for shard in plan.shards}
    left = [shard for shard in plan.shards if not files[shard.name].is_finished()]
    progress.update(sum(shard.size for shard in plan.shards if shard not in left))
    with closing(read_ahead(left, read_bytes, is_pinned=device.type == "cuda")) as batches:
        for shard in left:
            progress.set_description(shard.number)
            with files[shard.name] as file:
                missing = len(shard.sources)
                while missing:
                    batch = next(batches)
                    for name, tensor in made_of(batch, device, plan.is_fp8):
                        file.write(name, tensor)
                    missing -= len(batch.sources)
                    progress.update(batch.numbers.nbytes)
                    del batch  # so that its memory is free when the next is asked for


def file_of(plan: Plan, shard: Shard, draft: Path) -> TensorFile:
    """The file of a shard, with the places of all its tensors."""
    written = (each for source in shard.sources for each in source.written(plan.is_fp8))
    return TensorFile(draft / shard.name, written)


def made_of(batch: Batch, device: torch.device, is_fp8: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors to write for a batch."""
    scheme = batch.sources[0].scheme
    if scheme is None:
        for source, numbers in zip(batch.sources, batch.numbers, strict=True):
            yield source.name, numbers
        return
    numbers = batch.numbers.to(device, non_blocking=True)
    for source, matrix in zip(batch.sources, numbers, strict=True):
        check_finite(matrix, f"{source.block.path}: {source.name}")
    packed = quantize(numbers, scheme)
    for i, source in enumerate(batch.sources):
        yield from packed_entries(source.name, packed[i], is_fp8=is_fp8)  # type: ignore[arg-type]
