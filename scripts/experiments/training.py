"""Training of small models for the experiments: many of them beside each other on one GPU.

The step of a model of two narrow layers is a few hundred small kernels, which the host launches
more slowly than the GPU runs them. So forward, backward and update are recorded as one CUDA graph,
and the graphs of several models are replayed on streams of their own. Where a step cannot be
recorded it runs kernel by kernel; `Learner.graph_error` says why.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear import KimiLinearForCausalLM

WARM_UP_STEPS = 3
CLIP_NORM = 1.0
MESSAGE_LENGTH = 200


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        learning_rate: After the warm-up; it stays, but for `decay_steps`.
        warmup: Steps over which it rises from 0.
        decay_steps: First and last step of a linear descent to 0; None: none.
        weight_decay: Of matrices.
        is_bfloat16: Whether products are computed in bfloat16; weights are float32.
        is_recorded: Whether the step is recorded as a CUDA graph, where there is CUDA.
    """

    learning_rate: float
    warmup: int = 100
    decay_steps: tuple[int, int] | None = None
    weight_decay: float = 0.1
    is_bfloat16: bool = False
    is_recorded: bool = True

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        factor = min(1.0, step / max(1, self.warmup))
        if self.decay_steps is not None:
            first, last = self.decay_steps
            factor *= min(1.0, max(0.0, (last - step + 1) / max(1, last - first)))
        return self.learning_rate * factor


class Learner:
    """A model with its optimizer.

    Args:
        model: On the device where it is trained.
        recipe: How.
        shape: [B, T] of its batches.
    """

    def __init__(
        self, model: KimiLinearForCausalLM, recipe: Recipe, shape: tuple[int, int]
    ) -> None:
        self.model, self.recipe = model.train(), recipe
        self.device = next(model.parameters()).device
        self.num_steps, self.graph_error, self.error = 0, "", ""
        is_cuda = self.device.type == "cuda"
        rate = torch.zeros((), device=self.device) if is_cuda else 0.0
        self.optimizer = torch.optim.AdamW(
            _groups(model, recipe.weight_decay),
            lr=rate,
            betas=(0.9, 0.95),
            fused=is_cuda,
            capturable=is_cuda,
        )
        self.ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.labels = torch.zeros_like(self.ids)
        self.loss = torch.zeros((), device=self.device)
        self.stream = torch.cuda.Stream() if is_cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        if is_cuda and recipe.is_recorded:
            self._record()

    def step(self, ids: Tensor, labels: Tensor) -> None:
        """One update on a batch [B, T]; on a GPU it is queued, not waited for."""
        self.num_steps += 1
        with self._on_stream():
            self._set_rate(self.recipe.rate(self.num_steps))
            self.ids.copy_(ids)
            self.labels.copy_(labels)
            if self.graph is not None:
                self.graph.replay()
            else:
                self.optimizer.zero_grad(set_to_none=True)
                self._update()

    def attempt(self, ids: Tensor, labels: Tensor) -> bool:
        """`step`, or False with `error` saying why, which others beside this one survive."""
        try:
            self.step(ids, labels)
        # any kind: a kernel that cannot be built is a result too
        except Exception as error:
            self.error = _message(error)
        return not self.error

    def count_right(self, ids: Tensor, labels: Tensor) -> Tensor:
        """[2]: labels that the model predicts, and labels there are; -100 is none."""
        with self._on_stream(is_awaited=True), torch.no_grad(), self._autocast():
            right = self._logits(ids).argmax(-1) == labels
            return torch.stack([right.sum(), (labels >= 0).sum()])

    def loss_of(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss in nats, without an update."""
        with self._on_stream(is_awaited=True), torch.no_grad(), self._autocast():
            return self._loss(ids, labels)

    def predict_last(self, ids: Tensor) -> Tensor:
        """[B]: the most likely token behind ids [B, T]."""
        with self._on_stream(is_awaited=True), torch.no_grad(), self._autocast():
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            return self.model.lm_head(hidden[:, -1]).argmax(-1)

    def read(self, reader: Callable[[KimiLinearForCausalLM], Any]) -> Any:
        """What a function says of the model as it is now."""
        with self._on_stream(is_awaited=True), torch.no_grad(), self._autocast():
            return reader(self.model)

    @contextmanager
    def _on_stream(self, is_awaited: bool = False) -> Iterator[None]:
        """On the learner's own stream, after what the caller's has queued, which waits afterwards
        if it reads what comes out."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        if is_awaited:
            current.wait_stream(self.stream)

    def _autocast(self) -> AbstractContextManager[Any]:
        # without its cache of cast weights, which a recording would read after it is gone
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.recipe.is_bfloat16,
            cache_enabled=False,
        )

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _logits(self, ids: Tensor) -> Tensor:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden)

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(ids).float().flatten(0, 1), labels.flatten())

    def _update(self) -> None:
        with self._autocast():
            loss = self._loss(self.ids, self.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _record(self) -> None:
        """Warm up at a learning rate of 0, which changes no weight, forget that, and record."""
        try:
            with self._on_stream():
                self._set_rate(0.0)
                for _ in range(WARM_UP_STEPS):
                    self.optimizer.zero_grad(set_to_none=True)
                    self._update()
                for state in self.optimizer.state.values():
                    for value in state.values():
                        value.zero_()
                self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._update()
            self.graph = graph
        # any kind: of a call that waits for the device, or of a kernel, which `step` meets again
        except Exception as error:
            self.graph_error = _message(error)
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, which decay, and norms, biases and rates, which do not."""
    weights, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_weight = name.endswith("weight") and parameter.ndim > 1
        (weights if is_weight else others).append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


class Pool:
    """Batches made many at a time, which several learners read.

    Args:
        sample: Makes so many rows of ids and labels.
        rows: B of a batch.
        batches: How many to make at once.
    """

    def __init__(
        self, sample: Callable[[int], tuple[Tensor, Tensor]], rows: int, batches: int
    ) -> None:
        self.sample, self.rows, self.batches = sample, rows, batches
        self._next = batches
        self._made: list[tuple[Tensor, ...]] = []

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next batch: ids and labels [B, T]."""
        if self._next == self.batches:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # nobody reads the old ones any more
            parts = [x.split(self.rows) for x in self.sample(self.rows * self.batches)]
            self._made, self._next = list(zip(*parts, strict=True)), 0
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # other streams may read them
        ids, labels = self._made[self._next]
        self._next += 1
        return ids, labels
