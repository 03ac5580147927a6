"""Sums and gatherings over processes that a CUDA graph can record.

On one host each GPU reads the parts of the others from their memory, in one kernel. Elsewhere they
are NCCL's, or gloo's, which are not recorded. Each class has buffers of its own, so that a
recording can repeat it: write `part`, call `run`, read the result.

Shapes: P processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_linear.upstream.shared_memory import SUMMED_DTYPES, SharedMemory, SharedMemoryError

# How steps sum: where GPUs read each other's memory by `decode/sum_kernels.py` or by torch's
# operator, else by the group.
WAYS = ("kernels", "operator", "group")
WAY = "kernels"
SHARING_DEVICES = ("cuda",)


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


class Meetings:
    """Two places for a process' part, and flags, in memory that the others can read, see
    `decode/sum_kernels.py`.

    Args:
        part: Of the shape, dtype and device of a process' part.
        num_programs: Programs of a kernel that reads the parts.
        group: The processes.

    Attributes:
        parts: Of this process, in turn.
        addresses: int64 [2, P], where those of each process are.
        flags: int64 [P], where those of each process are: int64 [P, programs].
        epochs: int64 [programs], how often each program has met the others.

    Raises:
        SharedMemoryError: On every process, if one of them cannot.
    """

    def __init__(self, part: Tensor, num_programs: int, group: Any) -> None:
        device, ranks = part.device, range(group.size())
        self._memory = SharedMemory((2, *part.shape), part.dtype, device, group)
        self._flags = SharedMemory((len(ranks), num_programs), torch.int64, device, group)
        self._flags.own.zero_()
        self.parts = list(self._memory.own)
        self._seen = [(self._memory.of(rank), self._flags.of(rank)) for rank in ranks]
        places = [[part.data_ptr() for part in parts] for parts, _ in self._seen]
        self.addresses = torch.tensor(places, dtype=torch.int64, device=device).t().contiguous()
        flags = [flags.data_ptr() for _, flags in self._seen]
        self.flags = torch.tensor(flags, dtype=torch.int64, device=device)
        self.epochs = torch.zeros(num_programs, dtype=torch.int64, device=device)
        self._flags.settle()
        self._next = 0

    def restart(self) -> None:
        """Begin with the first place again; all processes have read what is there."""
        self._next = 0

    def take(self) -> tuple[Tensor, Tensor]:
        """The next part to write, and where each process has its own of them: int64 [P]."""
        place, self._next = self._next, 1 - self._next
        return self.parts[place], self.addresses[place]


class GroupGather:
    """The processes' parts, one behind the other, by the group's own means.

    Args:
        part: Of this process.
        group: The processes.

    Attributes:
        part: To be written before `run`.
    """

    def __init__(self, part: Tensor, group: Any) -> None:
        self.part, self._group = part, group
        self._parts = part.new_empty(group.size(), *part.shape)

    def run(self, out: Tensor) -> None:
        """out [P, ...] = the parts in the order of the ranks; all processes have to."""
        # newer torch has another name for it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(self._parts.flatten(0, 1), self.part, group=self._group)
        out.copy_(self._parts)


class SharedGather:
    """As `GroupGather`, by reading the others' memory."""

    def __init__(self, part: Tensor, group: Any) -> None:
        self._memory = SharedMemory(part.shape, part.dtype, part.device, group)
        self.part = self._memory.own

    def run(self, out: Tensor) -> None:
        """out [P, ...] = the parts in the order of the ranks; all processes have to."""
        self._memory.gather_into(out)


def uses_kernels(device: torch.device) -> bool:
    """Whether a step on this device tries `Meetings` first."""
    return WAY == "kernels" and device.type in SHARING_DEVICES


def make_sum(total: Tensor, group: Any) -> GroupSum | SharedSum:
    """The fastest one that there is for this tensor; all processes make it at once."""
    if WAY != "group" and total.is_cuda and total.dtype in SUMMED_DTYPES:
        try:
            return SharedSum(total, group)
        except SharedMemoryError:
            pass
    return GroupSum(total, group)


def make_gather(part: Tensor, group: Any) -> GroupGather | SharedGather:
    """The fastest one that there is for tensors like `part`; all processes make it at once."""
    if WAY != "group" and part.is_cuda:
        try:
            return SharedGather(part, group)
        except SharedMemoryError:
            pass
    return GroupGather(part, group)
