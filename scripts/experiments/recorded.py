"""Forward and backward pass of a training step as one CUDA graph.

The host needs more time to launch the kernels of a step of a few thousand tokens than a GPU needs
to run them. Recorded once, they are replayed for every batch of the same shape.
"""

from collections.abc import Callable

import torch
from measuring.report import say
from torch import Tensor

WARM_UP_STEPS = 3


class RecordedGradients:
    """A loss with its gradients.

    The gradients are made anew by every call, not added up: whoever updates the weights leaves them
    where they are. Recorded are the kernels that the first calls ran, so nothing in the pass may
    depend on what the tensors hold.

    Args:
        loss: Of ids [B, T], backward pass included; what it returns is kept where it lies.
        ids: [B, T] int64, a batch for the warm-up, on the device.
        forget: Sets the gradients to None.

    Attributes:
        error: Why nothing was recorded, and calls run kernel by kernel; empty: nothing hinders.
    """

    def __init__(
        self,
        loss: Callable[[Tensor], tuple[Tensor, ...]],
        ids: Tensor,
        forget: Callable[[], None],
    ) -> None:
        self._loss, self._forget, self.error = loss, forget, ""
        self._ids, self._graph = ids.clone(), None
        if ids.is_cuda:
            self._graph = self._recorded()

    def __call__(self, ids: Tensor) -> tuple[Tensor, ...]:
        """What `loss` returns, with gradients in place; valid until the next call."""
        if self._graph is None:
            self._forget()
            return self._loss(ids)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._out

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        # kernels are compiled and tuned, and workspaces taken, on a stream beside the default one
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._forget()
                self._loss(self._ids)
            self._forget()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._out = self._loss(self._ids)
        # any kind: a pass that waits for the device cannot be recorded, but still runs
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            say(f"forward and backward pass are not recorded: {self.error}")
            return None
        finally:
            torch.cuda.synchronize()
        return graph
