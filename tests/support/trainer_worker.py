"""A few steps of Trainer, by one process or by several that accelerate started.

    accelerate launch --config_file ... tests/trainer_worker.py FOLDER [FLAG ...]

Writes the steps' losses to FOLDER/losses.json and the model to FOLDER/model. Flags:
"checkpointing", "bf16", "resume" (again from the checkpoint of step 2, to FOLDER/resumed).
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import state
from accelerate.utils import DistributedType
from builders import tiny_model, token_ids
from transformers import TrainingArguments, set_seed

from kimi_linear.training.safe_trainer import SafeTrainer

ROWS, TOKENS, STEPS = 4, 64, 4


def shard_on_a_cpu() -> None:
    """Let accelerate shard the model on a CPU, too, where it would take DDP without a word."""
    state.PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


class Rows(torch.utils.data.Dataset):
    """Packed rows: two sequences each, of different lengths."""

    def __init__(self) -> None:
        self.ids = token_ids(ROWS * STEPS, TOKENS)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        cut = 7 + 3 * i
        positions = torch.cat([torch.arange(cut), torch.arange(TOKENS - cut)])
        return {"input_ids": self.ids[i], "labels": self.ids[i], "position_ids": positions}


def main(folder: Path, flags: list[str]) -> None:
    if torch.cuda.is_available():
        sys.path.append(str(Path(__file__).parents[2] / "scripts"))
        from measuring.autotuning import limit_autotuning

        limit_autotuning(2)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        shard_on_a_cpu()
    train(folder, flags)
    if "resume" in flags:
        train(folder / "resumed", flags, folder / "checkpoint-2")


def train(folder: Path, flags: list[str], checkpoint: Path | None = None) -> None:
    set_seed(0)
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-2,  # so that gradients which are rounding only change nothing
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        bf16="bf16" in flags,
        gradient_checkpointing="checkpointing" in flags,
    )
    args.per_device_train_batch_size = ROWS // args.world_size
    trainer = SafeTrainer(tiny_model(num_experts=8), args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found = {"losses": losses, "model": type(trainer.model_wrapped).__name__}
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
