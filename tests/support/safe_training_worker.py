"""A small training run; as a program, one that is killed while it saves its second checkpoint, or
one of several processes of which the last one's second step is spoiled.

Arguments: output folder, what it has done last when it dies or "spoil", number of threads.
"""

import os
import signal
import sys
from typing import Any

import torch
from builders import tiny_model, token_ids
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from kimi_linear.training import safe_trainer as safe_training
from kimi_linear.training.safe_trainer import SafeTrainer

STEPS = 6

__all__ = ["STEPS", "Trainer", "TrainerCallback", "make_trainer"]


def make_trainer(folder: Any, kind: type, **options: Any) -> Any:
    """Six steps of two calls, a checkpoint every other step, of which the last two are kept."""
    own = {name: options.pop(name) for name in ("bad_step", "max_skipped") if name in options}
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(24, 12)]
    defaults = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "gradient_accumulation_steps": 2,
    }
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    linear = {"full_attn_layers": [1, 2], "num_heads": 2, "head_dim": 16}  # the fast kind of layer
    model = tiny_model(num_hidden_layers=2, linear_attn_config=linear)
    return kind(model, arguments, train_dataset=rows, eval_dataset=rows[:4], **own)


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Be killed when the checkpoint of step 4 has come to this point."""
    if moment == "weights":
        original = torch.save

        def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            original(obj, path, *args, **kwargs)
            if "checkpoint-4" in str(path):
                die()

        torch.save = save
    elif moment == "state":
        original_state = TrainerState.save_to_json

        def save_state(self: Any, path: str) -> None:
            original_state(self, path)
            if "checkpoint-4" in path:
                die()

        TrainerState.save_to_json = save_state
    else:
        publish = safe_training.publish
        name = "checkpoint-4"
        safe_training.publish = lambda *args: die() if args[1].name == name else publish(*args)


class Spoiled(SafeTrainer):
    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        is_last = self.args.process_index == self.args.world_size - 1
        factor = float("nan") if is_last and self.state.global_step == 1 else 1.0
        return super().compute_loss(model, inputs, **kwargs) * factor


def train_spoiled(folder: str) -> None:
    """Exit with 3 where the spoiled step was found."""
    trainer = make_trainer(folder, Spoiled, save_steps=1, average_tokens_across_devices=False)
    try:
        trainer.train()
    except FloatingPointError as error:
        assert "step 2: the loss is" in str(error)
        sys.exit(3)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))  # as many as of the run that goes on
    if sys.argv[2] == "spoil":
        train_spoiled(sys.argv[1])
    die_at(sys.argv[2])
    make_trainer(sys.argv[1], SafeTrainer).train()
