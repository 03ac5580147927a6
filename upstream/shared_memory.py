"""Undocumented names of torch for what several processes have together: a process' own part of a
DTensor, and GPU memory that all processes of a group can read (symmetric memory).

Each GPU reads the others' memory itself, over NVLink; multicast, by which the switch sums, stays
off.
"""

import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
SUMMED_DTYPES = (torch.bfloat16, torch.float32)  # of `SharedMemory.sum_into`


def own_tensor(x: Any) -> Tensor:
    """A process' part of a DTensor: `to_local()` in a tenth of its time, without a graph."""
    return x._local_tensor


class SharedMemory:
    """A tensor of each process of a group, in GPU memory that all of them can read.

    All processes make it at once, and call its methods at once and in the same order; what those
    launch can be recorded as a CUDA graph.

    Args:
        shape, dtype, device: Of a process' own.
        group: The processes.

    Attributes:
        own: This process' tensor.

    Raises:
        SharedMemoryError: On every process, if one of them cannot.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Any
    ) -> None:
        self._name, self._shape, self._dtype = group.group_name, shape, dtype
        self._group = group
        self._handle: Any = None
        if not can_share(device, group):
            raise SharedMemoryError("the GPUs cannot read each other's memory")
        from torch.distributed import _symmetric_memory as symmetric_memory

        reason: RuntimeError | None = None
        try:
            with _without_multicast():
                self.own: Tensor = symmetric_memory.empty(shape, dtype=dtype, device=device)
                self._handle = symmetric_memory.rendezvous(self.own, group)
        except RuntimeError as error:  # a container may forbid it
            reason = error
        if not all(_least([self._handle is not None], device, group)):
            raise SharedMemoryError("a process cannot share its GPU's memory") from reason

    def sum_into(self, out: Tensor) -> None:
        """out = sum of the processes' tensors, in the order of their ranks, the same on each."""
        torch.ops.symm_mem.one_shot_all_reduce_out(self.own, "sum", self._name, out)

    def gather_into(self, out: Tensor) -> None:
        """out [processes, *shape] = the processes' tensors, in the order of their ranks."""
        self._handle.barrier()
        for rank, place in enumerate(out):
            place.copy_(self.of(rank))
        self._handle.barrier()

    def of(self, rank: int) -> Tensor:
        """The tensor of a process, in its own GPU's memory."""
        # torch before 2.10 shares whole allocations, each of one tensor
        handle = self._handle
        find = getattr(handle, "get_remote_tensor", handle.get_buffer)
        return find(rank, self._shape, self._dtype)

    def settle(self) -> None:
        """Wait until all processes have written what they have written so far."""
        _least([0], self.own.device, self._group)


class SharedMemoryError(RuntimeError):
    """A group's GPUs do not share memory."""


def can_share(device: torch.device, group: Any) -> bool:
    """Whether all processes of a group are on one host, where each sees the others' GPUs and these
    read each other's memory; all processes ask at once, and get the same answer."""
    host = zlib.crc32(socket.gethostname().encode())
    sees_others, first, last = _least([_sees_others(group), host, -host], device, group)
    return bool(sees_others) and first == -last


def _least(numbers: list[int], device: torch.device, group: Any) -> list[int]:
    """Of all processes' numbers the least at each place."""
    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    return found.tolist()


def _sees_others(group: Any) -> bool:
    if not torch.cuda.is_available() or not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out"):
        return False
    own, count = torch.cuda.current_device(), torch.cuda.device_count()
    others = [i for i in range(count) if i != own]
    is_enough = dist.get_world_size(group) <= count
    return is_enough and all(torch.cuda.can_device_access_peer(own, i) for i in others)


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Within, torch asks the driver for no multicast object."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before
