"""Sums and gatherings over processes that a CUDA graph can record.

On one host each GPU reads the parts of the others from their memory, in one kernel. Elsewhere they
are NCCL's, or gloo's, which are not recorded. Each class has buffers of its own, so that a
recording can repeat it: write `part`, call `run`, read the result.

Shapes: P processes.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from kimi_linear.upstream.shared_memory import SUMMED_DTYPES, SharedMemory, SharedMemoryError

USES_SHARED_MEMORY = True  # where it is there


class GroupSum:
    """total = sum of the processes' parts, by the group's own means, in place.

    Args:
        total: Where the sum goes.
        group: The processes.

    Attributes:
        part: Of this process, to be written before `run`; as `total`.
        total: The sum, until the next part is written.
    """

    def __init__(self, total: Tensor, group: Any) -> None:
        self.part = self.total = total
        self._group = group

    def run(self) -> None:
        """Sum; all processes have to."""
        dist.all_reduce(self.total, group=self._group)


class SharedSum:
    """As `GroupSum`, by reading the others' memory: the part is another tensor than the total."""

    def __init__(self, total: Tensor, group: Any) -> None:
        self.total = total
        self._memory = SharedMemory(total.shape, total.dtype, total.device, group)
        self.part = self._memory.own

    def run(self) -> None:
        """Sum; all processes have to."""
        self._memory.sum_into(self.total)


class GroupGather:
    """parts [P, ...] = the processes' parts, by the group's own means.

    Args:
        part: Of this process.
        group: The processes.

    Attributes:
        part: To be written before `run`.
        parts: What `run` writes.
    """

    def __init__(self, part: Tensor, group: Any) -> None:
        self.part, self._group = part, group
        self.parts = part.new_empty(group.size(), *part.shape)

    def run(self) -> None:
        """Gather; all processes have to."""
        # newer torch has another name for it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(self.parts.flatten(0, 1), self.part, group=self._group)


class SharedGather:
    """As `GroupGather`, by reading the others' memory."""

    def __init__(self, part: Tensor, group: Any) -> None:
        self._memory = SharedMemory(part.shape, part.dtype, part.device, group)
        self.part, self.parts = self._memory.own, part.new_empty(group.size(), *part.shape)

    def run(self) -> None:
        """Gather; all processes have to."""
        self._memory.gather_into(self.parts)


def make_sum(total: Tensor, group: Any) -> GroupSum | SharedSum:
    """The fastest one that there is for this tensor; all processes make it at once."""
    if USES_SHARED_MEMORY and total.is_cuda and total.dtype in SUMMED_DTYPES:
        try:
            return SharedSum(total, group)
        except SharedMemoryError:
            pass
    return GroupSum(total, group)


def make_gather(part: Tensor, group: Any) -> GroupGather | SharedGather:
    """The fastest one that there is for tensors like `part`; all processes make it at once."""
    if USES_SHARED_MEMORY and part.is_cuda:
        try:
            return SharedGather(part, group)
        except SharedMemoryError:
            pass
    return GroupGather(part, group)
