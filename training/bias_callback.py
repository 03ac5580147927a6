"""The experts' loads in Transformers' Trainer: logged, and evened out by the correction bias.

trainer = Trainer(...)
balance_experts(trainer, rate=1e-3)
trainer.train()
"""

from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kimi_linear.training.expert_loads import ExpertLoads, check_rate, load_statistics
from kimi_linear.upstream.trainer import put_callback_first


class ExpertBalanceCallback(TrainerCallback):
    """Updates the correction biases after each step, and adds the loads' statistics to the logs.

    Reporters are told before callbacks that Trainer was given: `balance_experts` puts this one
    first, so that they see the statistics too.

    Args:
        rate: Step of the update; 0: loads are logged only; None: the configuration's
            `router_bias_update_rate`.

    Raises:
        ValueError: If `rate` is not a finite number of at least 0.
    """

    def __init__(self, rate: float | None = None) -> None:
        if rate is not None:
            check_rate("rate", rate)
        self.rate = rate
        self.loads: ExpertLoads | None = None
        self._since_log: Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loads = ExpertLoads(kwargs["model"])
        self._since_log = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.loads is not None
        counts, config = self.loads.take(), self.loads.routers[0].config
        self.loads.update_biases(
            counts, config.router_bias_update_rate if self.rate is None else self.rate
        )
        self._since_log = counts if self._since_log is None else self._since_log + counts

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._since_log is None or self.loads is None:
            return
        found = load_statistics(self._since_log, self.loads.layers)
        self._since_log = None
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.loads is not None:
            self.loads.stop()


def balance_experts(trainer: Trainer, rate: float | None = None) -> ExpertBalanceCallback:
    """Add the callback to a Trainer, before its reporters; see `ExpertBalanceCallback`."""
    callback = ExpertBalanceCallback(rate)
    put_callback_first(trainer, callback)
    return callback
