"""Long training: no update from NaN or Inf in loss or gradients, no checkpoint that is broken.

    trainer = SafeTrainer(model, args, ..., bad_step="skip")

`SafeTrainer` is Transformers' Trainer; `SafeTrainingMixin` does the same for any subclass of it
(`class SafeSFTTrainer(SafeTrainingMixin, SFTTrainer)`). What Trainer itself does, in 5.17 as in
5.23: it leaves NaN out of the logged loss, but applies the update, and it writes a checkpoint's
files into the folder that resuming looks for, one after another. For loops of one's own there are
`finite.py` and `checkpoints/atomic.py`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from kimi_linear.checkpoints.atomic import UNFINISHED, publish, recover_all, remove, sync_folder
from kimi_linear.training.finite import not_finite_gradients, not_finite_states, not_finite_weights
from kimi_linear.upstream.trainer import CheckpointHooks, rotate_checkpoints

logger = logging.get_logger(__name__)

BadStep = Literal["stop", "skip"]
# Names in a message.
MAX_NAMES = 8


def _list(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none on this process") + more


def _on_any_process(is_so: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return is_so
    flag = torch.tensor(float(is_so), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class SafeTrainingMixin(CheckpointHooks):
    """Checks each step before its update, and writes checkpoints as a whole or not at all.

    Args:
        bad_step: What to do about a step whose loss or gradients have NaN or Inf: "stop" raises
            `FloatingPointError`, "skip" makes no update. Under float16 the gradient scaler goes on
            to skip steps with gradients that overflow, and only the loss counts.
        max_skipped: Maximum number of steps skipped in a row; one more is an error.
        *args, **kwargs: The Trainer's.

    Raises:
        ValueError: For an unknown `bad_step`, a `max_skipped` below 1, or "skip" with DeepSpeed,
            which makes its update within the backward pass.
    """

    # Trainer's
    accelerator: Any
    args: Any
    is_deepspeed_enabled: bool
    model: nn.Module
    optimizer: Any
    state: Any
    _draft: Path | None = None  # of the checkpoint that is being written

    def __init__(
        self, *args: Any, bad_step: BadStep = "stop", max_skipped: int = 10, **kwargs: Any
    ) -> None:
        if bad_step not in get_args(BadStep):
            raise ValueError(
                f"bad_step={bad_step!r} is not allowed: it must be one of {get_args(BadStep)}"
            )
        if max_skipped < 1:
            raise ValueError(f"max_skipped={max_skipped!r} is not allowed: it must be at least 1")
        super().__init__(*args, **kwargs)
        if bad_step == "skip" and self.is_deepspeed_enabled:
            raise ValueError("bad_step='skip' is not allowed with DeepSpeed: it must be 'stop'")
        if self.args.should_save:
            recover_all(
                Path(self.args.output_dir)
            )  # before a checkpoint to go on from is looked for
        self.bad_step, self.max_skipped = bad_step, max_skipped
        self.skipped_steps: list[int] = []
        self._skipped_in_a_row = 0
        self._losses: list[Tensor] = []

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; after the last call of a step, the step is checked."""
        loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        self._losses.append(loss.detach())
        if self.accelerator.sync_gradients:
            losses, self._losses = torch.stack(self._losses), []
            self._check_step(model, losses)
        return loss

    def _check_step(self, model: nn.Module, losses: Tensor) -> None:
        names = [] if self.accelerator.scaler is not None else not_finite_gradients(model)
        is_bad = bool(names) or not bool(losses.isfinite().all())
        if not _on_any_process(is_bad, losses.device):
            self._skipped_in_a_row = 0
            return
        step = self.state.global_step + 1
        what = (
            f"step {step}: the loss is {losses.sum().item()}, and gradients that are not finite "
            f"are those of {_list(names)}"
        )
        self._skipped_in_a_row += 1
        if self.bad_step == "stop" or self._skipped_in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{what}. The update was not made, {len(self.skipped_steps)} steps before it were "
                "skipped, and checkpoints are those of before"
            )
        logger.warning(f"{what}. The step is skipped")
        self.skipped_steps.append(step)
        if self.accelerator.scaler is None:  # it skips by itself, and has to see the gradients
            model.zero_grad(set_to_none=True)
        for module in model.modules():  # experts were chosen by numbers that are none
            loads: Any = getattr(module, "expert_loads", None)
            if loads is not None:
                loads.reset()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the number of skipped steps, if any; `train_loss` is the mean of the whole run, where
        Trainer's is that of the steps since resuming."""
        if self.skipped_steps and "loss" in logs:
            logs["skipped_steps"] = len(self.skipped_steps)
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _mean_loss(self) -> float:
        """Over all steps: those that were logged before `train()` began, and those since."""
        total, logged = self.loss_since_begin(), 0
        for values in self.state.log_history:
            if "loss" in values and values["step"] <= self.first_step:
                total += values["loss"] * (values["step"] - logged)
                logged = values["step"]
        return total / max(1, logged + self.state.global_step - self.first_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, but weights that are not finite are an error; a checkpoint's are looked at
        before it is begun."""
        names = [] if self._draft else not_finite_weights(self.model)
        if names:
            raise FloatingPointError(
                f"nothing is saved, since numbers are not finite in {_list(names)}"
            )
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def save_checkpoint(self, folder: Path, write: Callable[[], None]) -> None:
        """As Trainer's, in a folder beside the others that is renamed at the end."""
        final = folder / f"checkpoint-{self.state.global_step}"
        self._refuse_poison(final)
        self._clear_drafts(folder)
        self._draft = folder / f"{UNFINISHED}-{self.state.global_step}"
        try:
            write()
            self._finish_checkpoint(self._draft / final.name, final)
        except BaseException as error:
            shutil.rmtree(self._draft, ignore_errors=True)
            error.add_note(f"{final} was not written; older checkpoints are as they were")
            raise
        finally:
            draft, self._draft = self._draft, None
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)
            # only now, when the new one is safe, may older ones go
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if self.args.push_to_hub:
            self.push_written_checkpoint(str(final))

    def _finish_checkpoint(self, draft: Path, final: Path) -> None:
        """Name the best checkpoint as it will be called, write to the disk, rename."""
        best = self.state.best_global_step
        if best:
            best_folder = final.parent / f"checkpoint-{best}"
            if best == self.state.global_step or best_folder.exists():
                self.state.best_model_checkpoint = str(best_folder)
        if self.args.should_save:
            self.state.save_to_json(str(draft / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and draft.exists():
            sync_folder(draft)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(draft, final)
        self.accelerator.wait_for_everyone()

    def _refuse_poison(self, final: Path) -> None:
        names = [*not_finite_weights(self.model), *not_finite_states(self.optimizer, self.model)]
        if _on_any_process(bool(names), self.args.device):
            raise FloatingPointError(
                f"{final} is not written, since numbers are not finite in {_list(names)}"
            )

    def _clear_drafts(self, folder: Path) -> None:
        """What a run that was killed has left, which may be why the disk is full."""
        if self.args.should_save:
            recover_all(folder)
            for path in folder.glob(f"{UNFINISHED}-*"):
                remove(path)
        self.accelerator.wait_for_everyone()

    def output_folder(self, folder: str) -> str:
        """Where checkpoints are written: while one is, to its draft."""
        return str(self._draft or folder)

    def may_push(self) -> bool:
        """Not from a draft, which is about to move."""
        return self._draft is None


class SafeTrainer(SafeTrainingMixin, Trainer):
    """Transformers' Trainer with `SafeTrainingMixin`'s checks and checkpoints."""
