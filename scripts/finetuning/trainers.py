"""TRL's trainers as finetune.py runs them: our optimizers and schedules, the checks and checkpoints
of `training/safe_trainer.py`, and values on disk for curves, after any interruption too.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from learning.optimizers import make_optimizer, schedule_factor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from finetuning.settings import DpoSettings, GrpoSettings, Settings, SftSettings
from kimi_linear import KimiLinearForCausalLM
from kimi_linear.training.safe_trainer import SafeTrainingMixin

# Between two figures of a run.
DRAW_SECONDS = 60


class RecipeTrainer:
    """What is laid over TRL's trainers; `settings` is set before training."""

    settings: Settings

    def create_optimizer(self, model: Any = None) -> Any:
        """That of the settings, over what is to be trained."""
        if self.optimizer is None:
            settings = self.settings
            self.optimizer = make_optimizer(
                settings.optimizer,
                self.model if model is None else model,
                settings.learning_rate,
                settings.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """That of the settings, over all steps."""
        if self.lr_scheduler is None:
            kind, warmup = self.settings.schedule, self.settings.warmup
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: schedule_factor(kind, step / num_training_steps, warmup),
            )
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: `push_to_hub.py` writes one."""


class SftRecipe(RecipeTrainer, SafeTrainingMixin, SFTTrainer):
    pass


class DpoRecipe(RecipeTrainer, SafeTrainingMixin, DPOTrainer):
    pass


class GrpoRecipe(RecipeTrainer, SafeTrainingMixin, GRPOTrainer):
    pass


def is_first_process() -> bool:
    """Whether this process writes what only one may; as launchers number them."""
    return os.environ.get("RANK", "0") == "0"


def last_checkpoint(output: Path, resume: bool) -> str | None:
    """The checkpoint to go on from; None: from the start.

    Raises:
        ValueError: If there is one and nobody asked for it.
    """
    found = get_last_checkpoint(str(output)) if output.is_dir() else None
    if found is not None and not resume:
        name = Path(found).name
        raise ValueError(f"output={str(output)!r} holds {name}: resume, or take another folder")
    return found


class MetricsFile(TrainerCallback):
    """Writes what is logged to `metrics.jsonl`, a line each; a run that goes on begins with the
    lines up to its checkpoint. Draws `curves.png` with a checkpoint now and then, and at the end.
    """

    def __init__(self, output: Path, title: str) -> None:
        self.output, self.title = output, title
        self._drawn = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = "".join(json.dumps(values) + "\n" for values in state.log_history)
            part = self.output / "metrics.jsonl.part"
            part.write_text(lines, encoding="utf-8")
            part.replace(self.output / "metrics.jsonl")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._drawn > DRAW_SECONDS:
            self._draw(state)
            self._drawn = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def _draw(self, state: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            from learning.plots import plot_curves

            plot_curves(self.output / "curves.png", state.log_history, self.title)


class TokenCount(TrainerCallback):
    """Lets a run that goes on count `num_tokens` from where it was; TRL would begin at 0."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = [values["num_tokens"] for values in state.log_history if "num_tokens" in values]
        if counts and hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = counts[-1]


def tensorboard(output: Path, checkpoint: str | None) -> TrainerCallback:
    """Values for TensorBoard; what an interrupted run wrote after the checkpoint is hidden."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    first = None if checkpoint is None else int(checkpoint.rpartition("-")[2]) + 1
    folder = str(output / "tensorboard")
    writer = SummaryWriter(folder, purge_step=first) if is_first_process() else None
    callback = TensorBoardCallback(writer)
    callback.logging_dir = folder  # of the writer that evaluation opens
    return callback


def trainer_arguments(settings: Settings, config: Any) -> dict[str, Any]:
    """What the configurations of all three trainers take."""
    is_cuda = torch.cuda.is_available()
    return {
        "output_dir": settings.output,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "max_steps": settings.steps or -1,
        "num_train_epochs": settings.epochs or 1.0,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_every,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 0,
        "save_total_limit": settings.keep_checkpoints,
        "eval_strategy": "steps" if settings.eval_every and settings.eval_percent else "no",
        "eval_steps": settings.eval_every,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "report_to": "none",
        "dataloader_pin_memory": is_cuda,
        "use_cpu": not is_cuda,
        "seed": settings.seed,
        "use_cache": config.use_cache,  # Trainer writes it to the configuration, which is saved
    }


def make_trainer(
    settings: Settings, model: Any, tokenizer: Any, rows: Any, held_out: Any, rewards: list[Any]
) -> Any:
    """TRL's trainer of a recipe, with its model wrapped in adapters if the settings want them."""
    common = trainer_arguments(settings, model.config)
    given: dict[str, Any] = {
        "model": model,
        "train_dataset": rows,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "peft_config": lora_config(settings, model.config) if settings.lora else None,
    }
    trainer: Any
    if isinstance(settings, SftSettings):
        sft = SFTConfig(**common, max_length=settings.max_length, packing=settings.packing)
        trainer = SftRecipe(args=sft, **given)
    elif isinstance(settings, DpoSettings):
        dpo = DPOConfig(
            **common,
            max_length=settings.max_length,
            beta=settings.beta,
            loss_type=[settings.loss],
        )
        reference = None if settings.lora else reference_model(settings, model.dtype)
        trainer = DpoRecipe(args=dpo, ref_model=reference, **given)
    else:
        assert isinstance(settings, GrpoSettings)
        # TRL evaluates whole groups of answers only
        groups = max(1, settings.batch_size // settings.num_generations)
        common["per_device_eval_batch_size"] = groups * settings.num_generations
        grpo = GRPOConfig(
            **common,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_new_tokens,
            temperature=settings.temperature,
            beta=settings.beta,
            chat_template_kwargs={"sanitize_control_tokens": True},
        )
        with our_reference(settings):
            trainer = GrpoRecipe(args=grpo, reward_funcs=rewards, **given)
    trainer.settings = settings
    trainer.add_callback(TokenCount(trainer))
    return trainer


def reference_model(settings: Settings, dtype: torch.dtype) -> KimiLinearForCausalLM:
    """The model before its first step, which DPO and GRPO hold the trained one against."""
    return KimiLinearForCausalLM.from_pretrained(settings.model, dtype=dtype)


@contextmanager
def our_reference(settings: Settings) -> Iterator[None]:
    """While it is open, TRL's GRPO makes its reference of our class. It takes the class of that
    name in Transformers otherwise, and can't be given a model."""
    from trl.trainer import grpo_trainer

    def make(path: str, **kwargs: Any) -> KimiLinearForCausalLM:
        return reference_model(settings, kwargs["dtype"])

    original = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = make
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original


def lora_config(settings: Settings, config: Any) -> Any:
    """PEFT's configuration of the adapters that the settings want."""
    from peft import LoraConfig

    from kimi_linear.training.lora import lora_targets

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        task_type="CAUSAL_LM",
        **lora_targets(config, *settings.lora),
    )
