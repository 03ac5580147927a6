"""What demo.py, train.py and finetune.py share: held-out rows, packing, schedules, optimizers,
budgets of time, a progress bar.

Shapes: B rows of a batch, T tokens of a row.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from kimi_linear.training.parameter_groups import parameter_groups
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SCHEDULES = ("constant", "cosine", "wsd")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
# Coefficients of the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Moonlight's factor, arXiv 2502.16982 section 2.2: updates as large as AdamW's, so that both share
# a learning rate.
MUON_RMS = 0.2
# Between two states of the progress bar where stderr is a file.
LOG_SECONDS = 15


def hold_out(rows: Any, percent: float | None, seed: int, what: str = "row") -> tuple[Any, Any]:
    """Rows to train on and rows to evaluate on, the latter None if `percent` is 0 or None.

    Args:
        rows: A dataset of known length.
        percent: Rows to hold out, of a hundred; at least one is.
        seed: Of the choice.
        what: What messages call a row.

    Raises:
        ValueError: If there are fewer than two rows, or `percent` is not below 100.
    """
    if not percent:
        return rows, None
    if not 0 < percent < 100 or len(rows) < 2:
        raise ValueError(
            f"eval_percent={percent} of {len(rows)} {what}s is not allowed: above 0, below 100, "
            f"and at least one {what} for training and one held out"
        )
    count = min(max(1, round(len(rows) * percent / 100)), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def pack(
    sequences: Iterable[Sequence[int]], length: int, *, keep_rest: bool = False
) -> Iterator[dict[str, list[int]]]:
    """Lay token sequences end to end and cut the result into rows.

    Args:
        sequences: Token ids, each sequence with its own begin and end token.
        length: T.
        keep_rest: Whether to yield a last row that is shorter.

    Yields:
        `input_ids` [T] and `position_ids` [T], which restart with every sequence, so that none sees
        another.

    Raises:
        ValueError: If `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"length={length} is not allowed: a row needs at least 2 tokens")
    ids: list[int] = []
    positions: list[int] = []
    for sequence in sequences:
        ids.extend(sequence)
        positions.extend(range(len(sequence)))
        start = 0
        while len(ids) - start >= length:
            yield {"input_ids": ids[start : start + length], **_row(positions, start, length)}
            start += length
        del ids[:start], positions[:start]
    if keep_rest and len(ids) >= 2:
        yield {"input_ids": ids, **_row(positions, 0, len(ids))}


def _row(positions: list[int], start: int, length: int) -> dict[str, list[int]]:
    """Positions of one row; a sequence that goes on from the row before counts from 0 again."""
    row = positions[start : start + length]
    restart = next((i for i in range(1, length) if row[i] == 0), length)
    return {"position_ids": [*range(restart), *row[restart:]]}


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of rows of equal length.

    Args:
        rows: `input_ids` [T] and `position_ids` [T] of each.

    Returns:
        Both and `labels`, each [B, T] int64; the model shifts the labels.
    """
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "position_ids")}
    return {**batch, "labels": batch["input_ids"].clone()}


def schedule_factor(kind: str, progress: float, warmup: float = 0.02, decay: float = 0.4) -> float:
    """Factor on the learning rate.

    Args:
        kind: "constant", "cosine", or "wsd" (constant, then a linear descent to 0).
        progress: Fraction of the training that is done, from 0 to 1.
        warmup: Fraction over which the factor rises from 0; any kind.
        decay: Fraction at the end over which "wsd" descends.

    Returns:
        A factor from 0 to 1.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule={kind!r} is not allowed: it must be one of {SCHEDULES}")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))
    if kind == "wsd" and decay > 0:
        return min(1.0, (1 - progress) / decay)
    return 1.0


class Muon(torch.optim.Optimizer):
    """Muon for matrices inside the network, AdamW for everything else, in one optimizer.

    A matrix's update is its momentum, orthogonalised by Newton-Schulz iterations (Jordan et al.
    2024), scaled as in Moonlight (arXiv 2502.16982) so that the learning rate and weight decay of
    AdamW fit. A tensor [E, m, n] is E matrices.

    Args:
        groups: From `parameter_groups` with `muon=True`: those whose "muon" is true get Muon.
        lr: Learning rate of both.
        momentum: Muon's momentum (Nesterov's form).
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon_update if group["muon"] else self._adam_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter, group), alpha=-group["lr"])
        return loss

    def _muon_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                "optimizer='muon' is not allowed with sharded parameters (FSDP2), since it needs "
                "whole matrices: it must be 'adamw'"
            )
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(average, group["momentum"])
        scale = MUON_RMS * max(parameter.shape[-2:]) ** 0.5
        return orthogonalise(ahead).to(parameter.dtype).mul_(scale)

    def _adam_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(
                step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
            )
        state["step"] += 1
        mean = state["mean"].lerp_(parameter.grad, 1 - beta1)
        square = state["square"].lerp_(parameter.grad.square(), 1 - beta2)
        mean = mean / (1 - beta1 ** state["step"])
        return mean / ((square / (1 - beta2 ** state["step"])).sqrt_() + group["eps"])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of [..., m, n] by values near 1, in float32."""
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizer(
    kind: str, model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a name in `OPTIMIZERS`, with the groups of `parameter_groups`.

    Raises:
        ValueError: If there is no such optimizer, it is not installed, or for a parameter that is
            in no group.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer={kind!r} is not allowed: it must be one of {OPTIMIZERS}")
    groups = parameter_groups(model, weight_decay, muon=kind == "muon")
    if kind == "muon":
        return Muon(groups, lr)
    if kind == "adamw8bit":
        return _adamw_8bit(model, groups, lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _adamw_8bit(model: nn.Module, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW: states of 8 bits, but of 32 for embeddings, as its authors advise, and
    for small tensors."""
    try:
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
    except ImportError as error:
        raise ValueError(
            f"optimizer='adamw8bit' needs bitsandbytes, which cannot be imported ({error})"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(
                module, "weight", {"optim_bits": 32}
            )
    return AdamW8bit(groups, lr=lr, betas=(0.9, 0.95))


class Budget:
    """How much of the training is done: by steps, or by the clock where `minutes` is given.

    The clock stands still outside `running` stretches, so that evaluations cost no training time.
    """

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        if (steps is None) == (minutes is None):
            raise ValueError(f"give one of steps={steps} and minutes={minutes}")
        if (steps or minutes or 0) <= 0:
            raise ValueError(f"steps={steps}, minutes={minutes}: must be above 0")
        self.steps, self.minutes = steps, minutes
        self._done_steps, self._seconds, self._since = 0, 0.0, None

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        return self._seconds + (time.perf_counter() - self._since if self._since else 0.0)

    def run(self) -> None:
        """Start the clock, or let it run on."""
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        """Stop the clock."""
        self._seconds, self._since = self.seconds, None

    def count_step(self, step: int) -> None:
        """Note that `step` steps are done."""
        self._done_steps = step

    def progress(self) -> float:
        """Fraction done, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, self._done_steps / self.steps)
        return min(1.0, self.seconds / (60 * self.minutes))


class BudgetCallback(TrainerCallback):
    """Stops training at the end of a budget, shows a progress bar, calls `on_point` on the way.

    Args:
        budget: The budget.
        tokens_per_step: For the tokens per second that the bar shows.
        on_point: Called with (step, seconds) at about `num_points` equally spaced points and at the
            end.
        num_points: How many.
    """

    def __init__(
        self,
        budget: Budget,
        tokens_per_step: int,
        on_point: Callable[[int, float], str],
        num_points: int = 10,
    ) -> None:
        self.budget, self.tokens_per_step = budget, tokens_per_step
        self.on_point, self.num_points = on_point, num_points
        self._points_done = 0
        self._loss = self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        interval = 0.5 if sys.stderr.isatty() else LOG_SECONDS
        layout = "{l_bar}{bar}| {elapsed}, {remaining} to go{postfix}"
        self._bar = tqdm(  # what remains is by the average so far, evaluations included
            total=100, bar_format=layout, mininterval=interval, miniters=0, smoothing=0
        )
        self.budget.run()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.budget.count_step(state.global_step)
        progress = self.budget.progress()
        if progress * self.num_points >= self._points_done + 1 or progress >= 1:
            self._points_done = int(progress * self.num_points)
            self.budget.pause()
            self._note = self.on_point(state.global_step, self.budget.seconds)
            self.budget.run()
        speed = self.tokens_per_step * state.global_step / self.budget.seconds
        text = f"step {state.global_step}, {speed:,.0f} tokens/s{self._loss}{self._note}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(100 * progress - self._bar.n)
        if progress >= 1:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f", loss {float(logs['loss']):.3f}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.budget.pause()
        self._bar.close()
