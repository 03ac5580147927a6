"""The decode step of a model that several processes have together (tensor parallelism): each has
some heads and features, and what they put out is summed behind every branch.

A process runs the step of its own part of the model, as if that were all of it. It differs in what
is written here: the embedding is looked up by the process that has the row, branches end with a
sum over the processes, and the head's logits are put side by side. All processes see the same sums,
to the bit, so they choose the same experts and tokens. Sums and gatherings are recorded with the
step (`parallel/sums.py`).

Shapes: B rows, D hidden size, P processes, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.decode.few_rows import FewRowsStep
from kimi_linear.decode.many_rows import ManyRowsStep
from kimi_linear.decode.projection_kernels import own_embedding_kernel
from kimi_linear.decode.step import DecodeStep, linked
from kimi_linear.decode.sum_kernels import sum_kernel, sum_norm_kernel
from kimi_linear.ops.runtime import power_of_two
from kimi_linear.parallel.sums import Meetings, make_gather, make_sum, uses_kernels
from kimi_linear.upstream.shared_memory import SharedMemoryError

# numbers that a program of `sum_kernel` sums, and its warps
SUM_BLOCK, SUM_WARPS = 1024, 4


class DividedStep(DecodeStep):
    """What steps of few and of many rows have in common.

    Args:
        group: The processes.
        model: This process' part, see `parallel/own_part.py`.
        args: As of `DecodeStep`.
    """

    def __init__(self, group: Any, model: nn.Module, *args: Any) -> None:
        super().__init__(model, *args)
        self.group = group
        self.gather = make_gather(self.logits, group)
        self.own_logits = self.gather.part
        self.logits = self._empty(self.num_rows, group.size() * self.own_logits.shape[1])

    def _look_up(self, out: Tensor) -> None:
        """out [B, D] = embeddings of the ids, or zeros where another process has them."""
        weight = self.embed.weight
        count, D = weight.shape
        own_embedding_kernel[(self.num_rows,)](
            self.ids,
            weight,
            out,
            self.group.rank() * count,
            count,
            D=D,
            PLACES=power_of_two(D),
        )

    def _make_logits(self) -> None:
        self._project(self.head, self.norm, self.own_logits)
        parts = self.logits.unflatten(1, (self.group.size(), -1))  # [B, P, V / P]
        self.gather.run(parts.transpose(0, 1))


class DividedFewRowsStep(DividedStep, FewRowsStep):
    """The first process adds the residual, so that the sum is the next one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sum = make_sum(self.hidden, self.group)
        self.part = self.sum.part
        if self.group.rank() > 0:
            self.residual = None

    def _embed(self) -> None:
        self._look_up(self.part)
        self.sum.run()

    def _end_branch(self) -> None:
        self.sum.run()


class DividedManyRowsStep(DividedStep, ManyRowsStep):
    """The sum of what the processes' branches put out is added with the next norm."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sum = make_sum(self.branch_out, self.group)
        self.branch_out = self.sum.part

    def _embed(self) -> None:
        self.hidden.zero_()
        self._look_up(self.branch_out[:, 0])
        self.to_add = self.branch_out
        self._end_branch()

    def _end_branch(self) -> None:
        parts = self.to_add
        assert parts is not None
        if parts is not self.branch_out:  # of several experts
            torch.sum(parts, dim=1, keepdim=True, out=self.branch_out)
        self.sum.run()
        self.to_add = self.sum.total


class LinkedFewRowsStep(DividedStep, FewRowsStep):
    """As `DividedFewRowsStep`, with sums by `sum_kernels.py`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.num_programs = -(-self.hidden.numel() // SUM_BLOCK)
        self.meetings = Meetings(self.hidden, self.num_programs, self.group)
        if self.group.rank() > 0:
            self.residual = None

    def _embed(self) -> None:
        self.meetings.restart()
        self.part, self.addresses = self.meetings.take()
        self._look_up(self.part)
        self._end_branch()

    def _end_branch(self) -> None:
        sum_kernel[(self.num_programs,)](
            self.addresses,
            self.meetings.flags,
            self.meetings.epochs,
            self.hidden,
            self.hidden.numel(),
            RANK=self.group.rank(),
            P=self.group.size(),
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
            **linked(self.is_linked),
        )
        self.part, self.addresses = self.meetings.take()


class LinkedManyRowsStep(DividedStep, ManyRowsStep):
    """Sums by `sum_kernels.py`, each with the next norm."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.meetings = Meetings(self.normed, self.num_rows, self.group)

    def _embed(self) -> None:
        self.meetings.restart()
        self.hidden.zero_()
        self._look_up(self.branch_out[:, 0])
        self.to_add = self.branch_out

    def _add_norm(self, norm: Any, log: Tensor | None = None) -> None:
        assert self.to_add is not None
        meetings = self.meetings
        _, addresses = meetings.take()
        others = addresses, meetings.flags, meetings.epochs
        sizes = {"RANK": self.group.rank(), "P": self.group.size()}
        self._launch_norm(sum_norm_kernel, others, norm, log, **sizes)


def divided_step(is_few: bool, group: Any, *args: Any) -> DividedStep:
    """A step of few rows or of many, with the fastest sums that there are; all processes make it
    at once. See `DividedStep`."""
    if uses_kernels(next(args[0].parameters()).device):
        try:
            return (LinkedFewRowsStep if is_few else LinkedManyRowsStep)(group, *args)
        except SharedMemoryError:
            pass
    return (DividedFewRowsStep if is_few else DividedManyRowsStep)(group, *args)
