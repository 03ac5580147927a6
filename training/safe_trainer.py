"""Long training: no update from NaN or Inf in loss or gradients, no checkpoint that is broken.

    trainer = SafeTrainer(model, args, ..., bad_step="skip")

`SafeTrainer` is Transformers' Trainer; `SafeTrainingMixin` does the same for any subclass of it
(`class SafeSFTTrainer(SafeTrainingMixin, SFTTrainer)`). What Trainer itself does, in 5.17 as in
5.23: it leaves NaN out of the logged loss, but applies the update, and it writes a checkpoint's
files into the folder that resuming looks for, one after another. The functions here are for loops
of one's own.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from kimi_linear.upstream.trainer import CheckpointHooks, rotate_checkpoints
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer
from transformers.utils import logging

logger = logging.get_logger(__name__)

BadStep = Literal["stop", "skip"]
# Trainer neither resumes from folders of such a name, nor counts them among its checkpoints, nor
# pushes them.
UNFINISHED = "_unfinished"
REPLACED = f"{UNFINISHED}-replaced"
# Linux' arguments of renameat2.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# Names in a message.
MAX_NAMES = 8


# ---- finding what is not finite ------------------------------------------------------------------


def not_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient, as far as it is on this process, has NaN or Inf."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [] if _are_finite(gradients.values()) else _not_finite(gradients)


def not_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and saved buffers that have NaN or Inf, on this process."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    return [] if _are_finite(weights.values()) else _not_finite(weights)


def not_finite_states(optimizer: Any, model: nn.Module) -> list[str]:
    """Names of the optimizer's states that have NaN or Inf, as "parameter: state"."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = {
        f"{names.get(id(parameter), '?')}: {key}": value
        for parameter, state in dict(getattr(optimizer, "state", None) or {}).items()
        if isinstance(state, dict)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return [] if _are_finite(states.values()) else _not_finite(states)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all are, by few kernels and one wait for the device. The largest value says it; a sum
    of squares could overflow without any NaN or Inf."""
    local = [_local(tensor) for tensor in tensors]
    local = [each for each in local if each.numel() and each.is_floating_point()]
    return not local or bool(torch.isfinite(get_total_norm(local, norm_type=float("inf"))))


@torch.no_grad()
def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, each in tensors.items() if not bool(_local(each).isfinite().all())]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none on this process") + more


def _on_any_process(is_so: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return is_so
    flag = torch.tensor(float(is_so), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


# ---- folders that are there as a whole or not at all ---------------------------------------------


@contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which takes its name when everything in it is on the disk.

    Whatever goes wrong before, `final` is what it was: absent, or the whole older folder. An error
    removes what was written; after a kill it stays as "_unfinished-...", for the next to clear.

    Args:
        final: Its folder must exist; older contents are replaced. A link is followed. An empty
            mount point cannot be replaced: its files come at the end, one after another.

    Yields:
        An empty folder beside it.
    """
    final = Path(os.path.realpath(final))
    recover(final.parent)
    draft = final.parent / f"{UNFINISHED}-{final.name}"
    _remove(draft)
    draft.mkdir()
    try:
        yield draft
        sync_folder(draft)
        publish(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until all files of a folder are on the disk.

    Raises:
        OSError: For instance if there is no room for them, which some systems say only now.
    """
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or os.name == "posix":  # only there a folder can be opened
            descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def publish(draft: Path, final: Path) -> None:
    """Give a folder its final name, in place of an older one of that name, in one step where the
    system can; elsewhere `recover` puts the older one back after a kill between two."""
    older = None
    if not os.path.lexists(final):
        draft.rename(final)
    elif exchange(draft, final):
        older = draft
    else:
        older = _replace(draft, final)
    if os.name == "posix":
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if older is not None:
        _remove(older)


def _replace(draft: Path, final: Path) -> Path:
    """Put a folder in an older one's place, in two steps; returns what is left to remove."""
    older = _aside(final)
    _remove(older)
    try:
        final.rename(older)
    except OSError as error:
        if error.errno != errno.EBUSY or any(final.iterdir()):
            raise
        _fill(draft, final)
        return draft
    try:
        draft.rename(final)
    except BaseException:
        older.rename(final)
        raise
    return older


def _fill(draft: Path, final: Path) -> None:
    """Copy a folder into an empty mount point, which keeps its name; an error empties it again."""
    try:
        shutil.copytree(draft, final, symlinks=True, dirs_exist_ok=True)
        sync_folder(final)
    except BaseException:
        for path in final.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        raise


def exchange(one: Path, two: Path) -> bool:
    """Let two files or folders swap their names in one step; False where the system, or the file
    system, has no call for that, and for mount points.

    Raises:
        OSError: The call failed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # only Linux has it
        return False
    names = os.fsencode(one), os.fsencode(two)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY):
        return False
    raise OSError(code, os.strerror(code), str(two))


def recover(folder: Path) -> None:
    """Give folders their names back that a kill has kept from being replaced."""
    for older in folder.glob(f"{REPLACED}-*"):
        final = folder / older.name.removeprefix(f"{REPLACED}-")
        if not os.path.lexists(final):
            older.rename(final)


def _aside(final: Path) -> Path:
    """Where an older folder is while the new one takes its name."""
    return final.with_name(f"{REPLACED}-{final.name}")


def _remove(path: Path) -> None:
    """Remove a folder, or the link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


# ---- Trainer -------------------------------------------------------------------------------------


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
            recover(Path(self.args.output_dir))  # before a checkpoint to go on from is looked for
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
        """As Trainer's, with the number of steps that were skipped, if there were any; `train_loss`
        is the mean of the whole run, of which Trainer knows the steps since it was resumed."""
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
            recover(folder)
            for path in folder.glob(f"{UNFINISHED}-*"):
                _remove(path)
        self.accelerator.wait_for_everyone()

    def output_folder(self, folder: str) -> str:
        """Where checkpoints are written: while one is, to its draft."""
        return str(self._draft or folder)

    def may_push(self) -> bool:
        """Not from a draft, which is about to move."""
        return self._draft is None


class SafeTrainer(SafeTrainingMixin, Trainer):
    """Transformers' Trainer with `SafeTrainingMixin`'s checks and checkpoints."""


__all__ = [
    "BadStep",
    "SafeTrainer",
    "SafeTrainingMixin",
    "atomic_folder",
    "not_finite_gradients",
    "not_finite_states",
    "not_finite_weights",
]
