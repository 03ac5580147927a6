"""Fine-tune a Kimi Linear: on conversations, on preferences, or by a reward that is computed.

    python scripts/finetune.py sft --model MODEL --dataset trl-lib/Capybara --output runs/chat
    python scripts/finetune.py dpo --model runs/chat --dataset trl-lib/ultrafeedback_binarized \\
        --output runs/preferred
    python scripts/finetune.py grpo --model runs/chat --dataset openai/gsm8k \\
        --dataset-config main --prompt-column question --reward number --output runs/solved

Datasets are of the Hub, or local: a folder, or a file of json, jsonl or parquet. Training goes on
with plain text, and from scratch, with `train.py`.

Settings come from flags, from a file, or both, in which case flags win; `settings.yaml` in the
output folder is such a file:

    python scripts/finetune.py sft --config run.yaml --learning-rate 2e-5

Adapters instead of all weights, on some parts or all of the model, and merged at the end:

    python scripts/finetune.py sft ... --lora attention shared --lora-rank 16 --merge

With checkpoints, a run that was cut off at any moment goes on as if it had not been. The same
command begins it and goes on with it:

    python scripts/finetune.py sft ... --save-every 100 --resume

The 48B model on GPUs, adapters on attention and shared experts:

    python scripts/finetune.py sft --model kimi-linear-48b --bf16 \\
        --dataset trl-lib/Capybara --lora attention shared dense --gradient-checkpointing \\
        --max-length 8192 --batch-size 1 --accumulate 16 --learning-rate 1e-4 --save-every 100 \\
        --resume --output runs/kimi-chat

`--quantize 24gb` holds the frozen base in 3 and 8 bits (`docs/quantization.md`).

`docs/finetuning.md` has the commands for the other recipes. The output folder holds the model or
its adapters with the tokenizer, `eval_results.json`, the logged values in `metrics.jsonl` and for
TensorBoard in `tensorboard/`, and their curves in `curves.png`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from finetuning.data import dpo_rows, grpo_rows, load_rows, sft_rows
from finetuning.rewards import make_reward
from finetuning.settings import (
    RECIPES,
    DpoSettings,
    GrpoSettings,
    Settings,
    SftSettings,
    add_flags,
    check_same,
    make_settings,
    read_yaml,
    write_yaml,
)
from learning.rows import hold_out
from learning.tokens import check_ids
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from kimi_linear import KimiLinearForCausalLM, KimiLinearQuantizationConfig
from kimi_linear.configuration_quantization import PRESETS
from kimi_linear.tokenizer import save_tokenizer

CHAT_END = "<|im_end|>"


def main(recipe: str, **values: Any) -> dict[str, float]:
    """Run a recipe.

    Args:
        recipe: "sft", "dpo" or "grpo".
        **values: Its settings, see `finetuning/settings.py`; `model`, `dataset` and `output` are
            needed.

    Returns:
        Measured values, also in `eval_results.json`: `train_loss`, the mean of what was logged, and
        with held-out rows `eval_loss` and what else the recipe measures on them.

    Raises:
        ValueError: For settings that are unknown, out of range or contradictory, and for rows that
            the recipe can't use; the message names them.
    """
    settings = make_settings(recipe, values)
    from finetuning import trainers  # TRL takes seconds: not where a setting is wrong

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    output = Path(settings.output)
    checkpoint = trainers.last_checkpoint(output, settings.resume)
    _note_settings(recipe, settings, output, checkpoint, trainers.is_first_process())
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer or settings.model)
    model = load_model(settings, tokenizer)
    rows, held_out = hold_out(
        load_rows(settings.dataset, settings.dataset_config, settings.split),
        settings.eval_percent,
        settings.seed,
    )
    prepared = [
        None if part is None else _prepare(settings, part, tokenizer) for part in (rows, held_out)
    ]
    trainer = trainers.make_trainer(settings, model, tokenizer, *prepared, _rewards(settings))
    trainer.add_callback(trainers.MetricsFile(output, f"{recipe} of {settings.model}"))
    trainer.add_callback(trainers.tensorboard(output, checkpoint))
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    measured = {"train_loss": trained.metrics["train_loss"]}
    if held_out is not None:
        measured |= _numbers(trainer.evaluate())
    _save(settings, trainer, tokenizer, output)
    if trainers.is_first_process():
        (output / "eval_results.json").write_text(json.dumps(measured, indent=2) + "\n")
        print(json.dumps(measured))
    return measured


def load_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> KimiLinearForCausalLM:
    """The model to start from; it ends answers at the end of a turn, as well as where it did.

    Weights are float32 where they are trained, also for computation in bfloat16; under adapters
    they are bfloat16 then.

    Raises:
        ValueError: If the tokenizer has more ids than the model.
    """
    dtype = torch.bfloat16 if settings.lora and settings.bf16 else torch.float32
    model = KimiLinearForCausalLM.from_pretrained(
        settings.model, dtype=dtype, quantization_config=_quantization(settings, dtype)
    )
    check_ids(tokenizer, model, settings.model)
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    turn = tokenizer.convert_tokens_to_ids(CHAT_END)
    if turn not in ends:
        model.generation_config.eos_token_id = [turn, *ends]
    return model


def _quantization(settings: Settings, dtype: torch.dtype) -> Any:
    """A preset of this package, Transformers' configuration of bitsandbytes, or None."""
    if settings.quantize in PRESETS:
        return KimiLinearQuantizationConfig.from_preset(settings.quantize)
    if settings.quantize == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.quantize == "8bit" else None


def _note_settings(
    recipe: str, settings: Settings, output: Path, checkpoint: str | None, is_first: bool
) -> None:
    """Write `settings.yaml`; a run that goes on must have the same."""
    path = output / "settings.yaml"
    if checkpoint is not None and path.exists():
        check_same(recipe, settings, path)
    output.mkdir(parents=True, exist_ok=True)
    if is_first:
        write_yaml(path, recipe, settings)


def _prepare(settings: Settings, rows: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    if isinstance(settings, SftSettings):
        return sft_rows(rows, tokenizer, settings.max_length, settings.loss_on)
    if isinstance(settings, DpoSettings):
        return dpo_rows(rows)
    assert isinstance(settings, GrpoSettings)
    return grpo_rows(rows, settings.prompt_column, settings.system)


def _rewards(settings: Settings) -> list[Any]:
    if not isinstance(settings, GrpoSettings):
        return []
    return [make_reward(name, settings.answer_column) for name in settings.reward]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _save(settings: Settings, trainer: Any, tokenizer: Any, output: Path) -> None:
    """The model, or its adapters and on request the two merged, each with the tokenizer."""
    trainer.save_model()
    if not trainer.args.should_save:
        return
    save_tokenizer(tokenizer, output)
    if settings.merge:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if settings.quantize:  # into the weights that it was made of
            from peft import PeftModel

            dtype = torch.bfloat16 if settings.bf16 else torch.float32
            base = KimiLinearForCausalLM.from_pretrained(settings.model, dtype=dtype)
            base.generation_config = model.generation_config
            model = PeftModel.from_pretrained(base, output)
        model.merge_and_unload().save_pretrained(output / "merged")
        save_tokenizer(tokenizer, output / "merged")


def _arguments(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="{sft,dpo,grpo}")
    for name, made in RECIPES.items():
        add_flags(recipes.add_parser(name, help=made.__doc__, description=made.__doc__), name)
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config")
    return {**(read_yaml(file) if file else {}), **flags}


if __name__ == "__main__":
    main(**_arguments())
