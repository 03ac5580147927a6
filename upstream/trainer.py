"""How Trainer writes a checkpoint and goes on from one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import rotate_checkpoints


def put_callback_first(trainer: Any, callback: Any) -> None:
    """Add a callback to a Trainer before those that it has, its reporters among them."""
    trainer.callback_handler.callbacks.insert(0, callback)


class CheckpointHooks:
    """How Trainer writes a checkpoint and goes on from one, for a class that stands before Trainer
    (5.17)."""

    first_step = 0  # the steps that were done when `train()` began

    # A run whose checkpoint is of its last step has nothing left to train; Trainer would train one
    # more step. What follows, such as sampling in an evaluation, goes on with the same numbers.
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(  # type: ignore[misc]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self.first_step = self.state.global_step  # type: ignore[attr-defined]
        if resume_from_checkpoint is not None and self.first_step >= max_steps:
            self._load_rng_state(resume_from_checkpoint)  # type: ignore[attr-defined]
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # type: ignore[attr-defined]
            self.control.should_training_stop = True  # type: ignore[attr-defined]
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = super()._get_output_dir(trial)  # type: ignore[misc]
        write = functools.partial(super()._save_checkpoint, model, trial)  # type: ignore[misc]
        self.save_checkpoint(Path(folder), write)

    def _get_output_dir(self, trial: Any) -> str:
        return self.output_folder(super()._get_output_dir(trial))  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.may_push():
            self.push_written_checkpoint(checkpoint_folder)

    def loss_since_begin(self) -> float:
        """The sum of the losses of all steps since `train()` began, when it is about to end."""
        return self._total_loss_scalar  # type: ignore[attr-defined]

    def push_written_checkpoint(self, folder: str) -> None:
        """Push a checkpoint's folder, as Trainer does behind each save."""
        super()._push_from_checkpoint(folder)  # type: ignore[misc]

    def save_checkpoint(self, folder: Path, write: Callable[[], None]) -> None:
        """Write a checkpoint of this step under `folder`; `write` is Trainer's way."""
        write()

    def output_folder(self, folder: str) -> str:
        """Where `write` puts it; `folder` is Trainer's choice."""
        return folder

    def may_push(self) -> bool:
        """Whether `write` may push what it wrote."""
        return True


__all__ = ["CheckpointHooks", "put_callback_first", "rotate_checkpoints"]
