"""Train a Kimi Linear: from scratch or from given weights, on files or on any dataset of the Hub.

From scratch, a small model with a tokenizer of its own on some files:

    python scripts/train.py src docs --pattern-glob '*.py' --preset 2m --vocab-size 4096 \\
        --epochs 2 --output runs/code

A preset, or a file with a configuration's fields, on a dataset of the Hub:

    python scripts/train.py --dataset roneneldan/TinyStories --preset 20m --tokenizer runs/code \\
        --steps 5000 --eval-percent 1 --save-every 500 --output runs/stories
    python scripts/train.py --dataset HuggingFaceFW/fineweb-edu --dataset-config sample-10BT \\
        --streaming --config big.json --tokenizer user/tokenizer --steps 100000 --bf16 \\
        --output runs/web

Go on after an interruption, with the same arguments and the last checkpoint:

    python scripts/train.py ... --output runs/stories --resume

Experts kept in balance from scratch, as DeepSeek-V3 does it, and their loads logged; a step whose
loss or gradients have NaN or Inf is skipped instead of ending the run:

    python scripts/train.py ... --router-bias-update-rate 1e-3 --router-aux-loss-coef 1e-4 \\
        --bad-step skip --output runs/stories

Fine-tune:

    python scripts/train.py texts.txt --init-from runs/stories --learning-rate 1e-4 --steps 200 \\
        --output runs/tuned

The output folder holds model, code and tokenizer, loads with `trust_remote_code=True`, and has the
measured values in `eval_results.json`.
"""

import argparse
import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset, IterableDataset, load_dataset
from learning.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, schedule_factor
from learning.rows import collate, hold_out, pack
from texts.evaluation import bits_per_byte, encode_texts
from texts.files import find_files, read_files
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kimi_linear import PRESETS, KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.tokenizer import convert_tiktoken, save_tokenizer, train_bpe
from kimi_linear.training.bias_callback import balance_experts
from kimi_linear.training.safe_trainer import BadStep, SafeTrainer

Texts = Dataset | IterableDataset
# Texts that a tokenizer is trained on, and held-out texts that bits per byte are measured on.
TOKENIZER_TEXTS, BITS_TEXTS = 100_000, 50


def main(
    *,
    output: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]] = (),
    pattern_glob: str = "*",
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    eval_percent: float = 0.0,
    preset: str | None = None,
    config: str | os.PathLike[str] | None = None,
    init_from: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    sequence_length: int = 512,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    optimizer: str = "adamw",
    schedule: str = "wsd",
    warmup: float = 0.02,
    save_every: int | None = None,
    keep_checkpoints: int = 2,
    eval_every: int | None = None,
    log_every: int = 10,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    router_aux_loss_coef: float | None = None,
    router_z_loss_coef: float | None = None,
    router_bias_update_rate: float | None = None,
    log_experts: bool = False,
    bad_step: BadStep = "stop",
    report_to: str = "none",
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
) -> dict[str, float]:
    """Train and save.

    Args:
        output: Folder for checkpoints and the finished model.
        paths: Files, one text each, and folders of them; or give `dataset`.
        pattern_glob: Which files to take from folders.
        dataset: What `datasets.load_dataset` takes: a dataset of the Hub, or a local folder.
        dataset_config, split, text_column: Which part of it.
        streaming: Read the dataset while training instead of downloading it first; needs `steps`.
        eval_percent: How many of a hundred texts are held out, chosen by `seed`.
        preset: Size of a new model, a key of `kimi_linear.PRESETS`; "2m" if nothing else is said.
        config: JSON file with the fields of a new model's configuration.
        init_from: Folder or repository whose weights to start from, instead of a new model.
        tokenizer: Folder or repository of a tokenizer; None: that of `init_from`, or a new one.
        vocab_size: Size of a new tokenizer.
        steps, epochs: How long; one of the two. 1 epoch if neither is given.
        batch_size, accumulate: Rows per device and call, and calls per step.
        sequence_length: Tokens per row. Texts are laid end to end, and none sees another.
        learning_rate, weight_decay, optimizer, schedule, warmup: See `learning/optimizers.py`.
        save_every: Steps between checkpoints; None: none but the finished model.
        keep_checkpoints: How many of them to keep.
        eval_every: Steps between evaluations; None: at the end only.
        log_every: Steps between logged losses.
        bf16: Compute in bfloat16, weights stay float32.
        gradient_checkpointing: Less memory for more time.
        router_aux_loss_coef, router_z_loss_coef, router_bias_update_rate: In place of the
            configuration's; see `KimiLinearConfig`.
        log_experts: Log the experts' loads; done anyway where their biases are updated.
        bad_step: "stop" or "skip", on NaN or Inf in loss or gradients; see `SafeTrainer`.
        report_to: "none", "tensorboard", or another of Trainer's reporters.
        threads: CPU threads; None: torch's choice.
        seed: Of weights, order and held-out texts.
        resume: Go on from the last checkpoint in `output`.

    Returns:
        Measured values, also in `eval_results.json`: `train_loss`, and with held-out texts
        `eval_loss`, `perplexity`, and `bits_per_byte` over whole texts.

    Raises:
        ValueError: For arguments out of range or contradicting each other.
    """
    folder = Path(output)
    checkpoint = _checkpoint(folder, resume)
    if threads is not None:
        torch.set_num_threads(threads)
    _at_most_one(steps=steps, epochs=epochs)
    if streaming and (steps is None or eval_percent):
        raise ValueError("streaming needs steps, and cannot hold texts out (eval_percent)")
    texts = _load_texts(paths, pattern_glob, dataset, dataset_config, split, text_column, streaming)
    texts, held_out = hold_out(texts, eval_percent, seed, "text")
    tokens = _load_tokenizer(
        tokenizer, init_from, vocab_size, checkpoint, folder, texts[text_column], sequence_length
    )
    model = _load_model(preset, config, init_from, checkpoint, tokens, seed)
    _set_router_training(
        model,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        router_bias_update_rate=router_bias_update_rate,
    )
    rows = to_rows(texts, text_column, tokens, sequence_length)
    total = steps or _steps(rows, epochs or 1.0, batch_size * accumulate)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        max_steps=total,
        learning_rate=learning_rate,
        logging_steps=log_every,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 0,
        save_total_limit=keep_checkpoints,
        eval_strategy="steps" if eval_every and held_out is not None else "no",
        eval_steps=eval_every,
        bf16=bf16,
        report_to=report_to,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=seed,
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    chosen = make_optimizer(optimizer, model, learning_rate, weight_decay)
    factor = LambdaLR(chosen, lambda step: schedule_factor(schedule, step / total, warmup))
    trainer = SafeTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=None
        if held_out is None
        else to_rows(held_out, text_column, tokens, sequence_length),
        data_collator=collate,
        processing_class=tokens,
        optimizers=(chosen, factor),
        bad_step=bad_step,
    )
    if log_experts or model.config.router_bias_update_rate:
        balance_experts(trainer)
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    measured = {"train_loss": trained.metrics["train_loss"]}
    if held_out is not None:
        measured |= _evaluate(trainer, tokens, held_out[text_column])
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_tokenizer(tokens, folder)
        (folder / "eval_results.json").write_text(json.dumps(measured, indent=2) + "\n")
        print(json.dumps(measured))
    return measured


def to_rows(
    texts: Texts, text_column: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> Texts:
    """Rows of `length` tokens: texts between begin and end tokens, laid end to end.

    Args:
        texts: Dataset with the column `text_column`.
        text_column: Its name; rows where it is empty are left out.
        tokenizer: It must have a begin and an end token.
        length: Tokens per row; what remains of every thousand texts is dropped.

    Returns:
        A dataset of the same kind with `input_ids` and `position_ids`.

    Raises:
        ValueError: If the tokenizer lacks a token, or no row can be filled.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None or end is None:
        raise ValueError(f"tokenizer has bos_token_id={begin}, eos_token_id={end}; it needs both")

    def batch_to_rows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = [text for text in batch[text_column] if text]
        encoded = encode_texts(tokenizer, found)
        rows = list(pack(([begin, *ids] for ids in encoded), length))
        return {key: [row[key] for row in rows] for key in ("input_ids", "position_ids")}

    rows = texts.map(batch_to_rows, batched=True, remove_columns=texts.column_names)
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"sequence_length={length} is above the tokens of all texts")
    return rows


def _load_texts(
    paths: Sequence[str | os.PathLike[str]],
    pattern_glob: str,
    dataset: str | None,
    dataset_config: str | None,
    split: str,
    text_column: str,
    streaming: bool,
) -> Texts:
    if bool(paths) == (dataset is not None):
        raise ValueError("give either files and folders or a dataset, one of the two")
    if dataset is None:
        files = find_files([Path(path) for path in paths], pattern_glob)
        return Dataset.from_dict({text_column: list(read_files(files))})
    texts = load_dataset(dataset, dataset_config, split=split, streaming=streaming)
    names = texts.column_names or list(next(iter(texts)))
    if text_column not in names:
        raise ValueError(
            f"text_column={text_column!r} is not allowed: {dataset} has {', '.join(names)}"
        )
    return texts.select_columns([text_column])


def _load_tokenizer(
    source: str | None,
    init_from: str | None,
    vocab_size: int | None,
    checkpoint: str | None,
    folder: Path,
    texts: Iterable[str],
    sequence_length: int,
) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for; a new one is trained on the texts and kept in `folder`."""
    if source is None and init_from is None and checkpoint is not None:
        return AutoTokenizer.from_pretrained(checkpoint)
    if source is not None or init_from is not None:
        if vocab_size is not None:
            raise ValueError(f"vocab_size={vocab_size} is for a new tokenizer, but one is given")
        return AutoTokenizer.from_pretrained(source or init_from)
    if vocab_size is None:
        raise ValueError("give a tokenizer, or the vocab_size of a new one")
    ranks = train_bpe(itertools.islice(filter(None, texts), TOKENIZER_TEXTS), vocab_size)
    length = max(32768, sequence_length)
    return convert_tiktoken(ranks, folder, eos_token="[EOS]", model_max_length=length)


def _load_model(
    preset: str | None,
    config: str | os.PathLike[str] | None,
    init_from: str | None,
    checkpoint: str | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> KimiLinearForCausalLM:
    """The model to train: given weights, or new ones; those of the checkpoint to go on from."""
    _at_most_one(preset=preset, config=config, init_from=init_from)
    if checkpoint is not None:
        # its configuration counts, not the preset's
        return KimiLinearForCausalLM.from_pretrained(checkpoint)
    if init_from is not None:
        model = KimiLinearForCausalLM.from_pretrained(init_from)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {len(tokenizer)} ids, which is not allowed: {init_from} has "
                f"{model.config.vocab_size}"
            )
        return model
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config is not None:
        fields = json.loads(Path(config).read_text(encoding="utf-8"))
        made = KimiLinearConfig(**{**fields, **ids})
    else:
        made = KimiLinearConfig.from_preset(preset or "2m", **ids)
    torch.manual_seed(seed)
    return KimiLinearForCausalLM(made)


def _set_router_training(model: KimiLinearForCausalLM, **fields: float | None) -> None:
    """Put what is given in place of the configuration's."""
    for field, value in fields.items():
        if value is not None:
            setattr(model.config, field, value)
    model.config.check()


def _steps(rows: Texts, epochs: float, rows_per_step: int) -> int:
    """Steps that so many passes over the rows take."""
    count = int(epochs * (len(rows) // rows_per_step))
    if count < 1:
        raise ValueError(
            f"epochs={epochs} of {len(rows)} rows is less than a step of {rows_per_step} rows"
        )
    return count


def _evaluate(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> dict[str, float]:
    """Loss on the held-out rows, and bits per byte of the first held-out texts as a whole."""
    loss = trainer.evaluate()["eval_loss"]
    some = list(itertools.islice(filter(None, texts), BITS_TEXTS))
    sequences = encode_texts(tokenizer, some)
    num_bytes = sum(len(text.encode("utf-8")) for text in some)
    bits = bits_per_byte(trainer.model, sequences, num_bytes, tokenizer.bos_token_id)
    return {"eval_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}


def _checkpoint(folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, if that was asked for."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and found is None:
        raise ValueError(f"resume: {folder} holds no checkpoint; allowed with save_every only")
    if found is not None and not resume:
        name = Path(found).name
        raise ValueError(f"output={str(folder)!r} holds {name}: resume, or take another folder")
    return found


def _at_most_one(**options: Any) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(options)}, not {' and '.join(given)}")


def _arguments(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data").add_argument
    data("paths", nargs="*", metavar="FILE_OR_DIR", help="texts, one per file")
    data("--pattern-glob", default="*", help="which files of folders to read (default: all)")
    data("--dataset", help="dataset of the Hub, or a local folder of one")
    data("--dataset-config", help="configuration of the dataset")
    data("--split", default="train")
    data("--text-column", default="text")
    data("--streaming", action="store_true", help="read while training; needs --steps")
    data("--eval-percent", type=float, default=0.0, help="texts to hold out, of a hundred")
    data("--sequence-length", type=int, default=512, help="tokens per row")
    model = parser.add_argument_group("model").add_argument
    model("--preset", choices=list(PRESETS), help="size of a new model (default: 2m)")
    model("--config", metavar="JSON", help="file with a new model's configuration")
    model("--init-from", metavar="MODEL", help="weights to start from")
    model("--tokenizer", metavar="DIR_OR_REPO", help="else that of --init-from, or a new one")
    model("--vocab-size", type=int, help="size of a new tokenizer")
    training = parser.add_argument_group("training").add_argument
    training("--output", required=True, metavar="DIR")
    training("--steps", type=int)
    training("--epochs", type=float, help="instead of --steps (default: 1)")
    training("--batch-size", type=int, default=8, help="rows per device and call")
    training("--accumulate", type=int, default=1, help="calls per step")
    training("--learning-rate", type=float, default=3e-3)
    training("--weight-decay", type=float, default=0.1)
    training("--optimizer", choices=OPTIMIZERS, default="adamw")
    training("--schedule", choices=SCHEDULES, default="wsd")
    training("--warmup", type=float, default=0.02, help="fraction of the steps")
    training("--save-every", type=int, help="steps between checkpoints")
    training("--keep-checkpoints", type=int, default=2)
    training("--eval-every", type=int, help="steps between evaluations (default: at the end)")
    training("--log-every", type=int, default=10)
    training("--bf16", action="store_true", help="compute in bfloat16")
    training("--gradient-checkpointing", action="store_true")
    training("--bad-step", choices=get_args(BadStep), default="stop", help="on NaN or Inf")
    training("--report-to", default="none", help="none, tensorboard, ...")
    training("--threads", type=int, help="CPU threads")
    training("--seed", type=int, default=0)
    training("--resume", action="store_true", help="go on from the last checkpoint")
    experts = parser.add_argument_group("experts").add_argument
    experts("--router-aux-loss-coef", type=float, help="balance loss of each sequence")
    experts("--router-z-loss-coef", type=float, help="loss on the size of the router's logits")
    experts("--router-bias-update-rate", type=float, help="step of the correction biases")
    experts("--log-experts", action="store_true", help="log the experts' loads")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    main(**_arguments())
