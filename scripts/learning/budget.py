"""A training's budget of steps or minutes, and the progress bar that shows it."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Between two states of the progress bar where stderr is a file.
LOG_SECONDS = 15


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
