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

import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset, IterableDataset, load_dataset
from learning.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, schedule_factor
from learning.rows import collate, hold_out, pack
from learning.tokens import check_ids, special_ids
from measuring.report import say
from options.settings import add_flags, command_parser, run_main, setting
from texts.evaluation import bits_per_byte, encode_texts
from texts.files import find_files, read_files
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kimi_linear import PRESETS, KimiLinearConfig, KimiLinearForCausalLM, engine_problems
from kimi_linear.checkpoints.engines import ENGINES
from kimi_linear.tokenizer import convert_tiktoken, save_tokenizer, train_bpe
from kimi_linear.training.bias_callback import balance_experts
from kimi_linear.training.safe_trainer import BadStep, SafeTrainer

Texts = Dataset | IterableDataset
# Texts that a tokenizer is trained on, and held-out texts that bits per byte are measured on.
TOKENIZER_TEXTS, BITS_TEXTS = 100_000, 50


DATA, MODEL, TRAINING, EXPERTS = "data", "model", "training", "experts"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained on what, and how.

    Attributes:
        paths: Files, one text each, and folders of them; or give `dataset`.
        router_aux_loss_coef, router_z_loss_coef, router_bias_update_rate: In place of the
            configuration's, see `KimiLinearConfig`.
        bad_step: See `SafeTrainer`.

    Raises:
        ValueError: For settings that contradict each other.
    """

    output: str | os.PathLike[str] = setting(MISSING, flag=False)
    paths: Sequence[str | os.PathLike[str]] = setting((), flag=False)
    pattern_glob: str = setting("*", "which files of folders to read (default: all)", group=DATA)
    dataset: str | None = setting(None, "dataset of the Hub, or a local folder of one", group=DATA)
    dataset_config: str | None = setting(None, "configuration of the dataset", group=DATA)
    split: str = setting("train", "split of the dataset", group=DATA)
    text_column: str = setting("text", "column of the dataset", group=DATA)
    streaming: bool = setting(False, "read while training; needs --steps", group=DATA)
    eval_percent: float = setting(0.0, "texts to hold out, of a hundred", group=DATA)
    sequence_length: int = setting(512, "tokens per row; no text in it sees another", group=DATA)
    preset: str | None = setting(
        None, "size of a new model (default: 2m)", choices=PRESETS, group=MODEL
    )
    config: str | os.PathLike[str] | None = setting(
        None, "file with a new model's configuration", metavar="JSON", group=MODEL
    )
    init_from: str | None = setting(None, "weights to start from", metavar="MODEL", group=MODEL)
    tokenizer: str | None = setting(
        None, "else that of --init-from, or a new one", metavar="DIR_OR_REPO", group=MODEL
    )
    vocab_size: int | None = setting(None, "size of a new tokenizer", group=MODEL)
    steps: int | None = setting(None, "how long", group=TRAINING)
    epochs: float | None = setting(None, "instead of --steps (default: 1)", group=TRAINING)
    batch_size: int = setting(8, "rows per device and call", group=TRAINING)
    accumulate: int = setting(1, "calls per step", group=TRAINING)
    learning_rate: float = setting(3e-3, "the highest one", group=TRAINING)
    weight_decay: float = setting(0.1, "of matrices", group=TRAINING)
    optimizer: str = setting("adamw", choices=OPTIMIZERS, group=TRAINING)
    schedule: str = setting("wsd", "of the learning rate", choices=SCHEDULES, group=TRAINING)
    warmup: float = setting(0.02, "fraction of the steps", group=TRAINING)
    save_every: int | None = setting(None, "steps between checkpoints", group=TRAINING)
    keep_checkpoints: int = setting(2, "how many of them to keep", group=TRAINING)
    eval_every: int | None = setting(
        None, "steps between evaluations (default: at the end)", group=TRAINING
    )
    log_every: int = setting(10, "steps between logged losses", group=TRAINING)
    bf16: bool = setting(False, "compute in bfloat16; weights stay float32", group=TRAINING)
    gradient_checkpointing: bool = setting(False, "less memory for more time", group=TRAINING)
    bad_step: BadStep = setting("stop", "on NaN or Inf", choices=get_args(BadStep), group=TRAINING)
    report_to: str = setting("none", "none, tensorboard, ...", group=TRAINING)
    threads: int | None = setting(None, "CPU threads (default: torch's choice)", group=TRAINING)
    seed: int = setting(0, "of weights, order and held-out texts", group=TRAINING)
    resume: bool = setting(False, "go on from the last checkpoint", group=TRAINING)
    router_aux_loss_coef: float | None = setting(
        None, "balance loss of each sequence", group=EXPERTS
    )
    router_z_loss_coef: float | None = setting(
        None, "loss on the size of the router's logits", group=EXPERTS
    )
    router_bias_update_rate: float | None = setting(
        None, "step of the correction biases", group=EXPERTS
    )
    log_experts: bool = setting(
        False, "log the experts' loads, also where no bias is updated", group=EXPERTS
    )

    def __post_init__(self) -> None:
        _at_most_one(steps=self.steps, epochs=self.epochs)
        if self.streaming and (self.steps is None or self.eval_percent):
            raise ValueError("streaming needs steps, and cannot hold texts out (eval_percent)")


def main(**values: Any) -> dict[str, float]:
    """Train and save.

    Args:
        **values: Fields of `Settings`; `output`, the folder for checkpoints and the finished
            model, is needed.

    Returns:
        Measured values, also in `eval_results.json`: `train_loss`, and with held-out texts
        `eval_loss`, `perplexity`, and `bits_per_byte` over whole texts.

    Raises:
        ValueError: For arguments out of range or contradicting each other.
    """
    settings = Settings(**values)
    folder = Path(settings.output)
    checkpoint = _checkpoint(folder, settings.resume)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    texts, held_out = hold_out(_load_texts(settings), settings.eval_percent, settings.seed, "text")
    tokens = _load_tokenizer(settings, checkpoint, texts[settings.text_column])
    model = _load_model(settings, checkpoint, tokens)
    _set_router_training(model, settings)
    trainer = _make_trainer(settings, model, tokens, texts, held_out)
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    measured = {"train_loss": trained.metrics["train_loss"]}
    if held_out is not None:
        measured |= _evaluate(trainer, tokens, held_out[settings.text_column])
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_tokenizer(tokens, folder)
        (folder / "eval_results.json").write_text(json.dumps(measured, indent=2) + "\n")
        print(json.dumps(measured))
    return measured


def _make_trainer(
    settings: Settings,
    model: KimiLinearForCausalLM,
    tokens: PreTrainedTokenizerBase,
    texts: Texts,
    held_out: Texts | None,
) -> SafeTrainer:
    """Trainer over the rows of the texts."""
    column, length = settings.text_column, settings.sequence_length
    rows, held_rows = (
        None if part is None else to_rows(part, column, tokens, length)
        for part in (texts, held_out)
    )
    rows_per_step = settings.batch_size * settings.accumulate
    steps = settings.steps or _steps(rows, settings.epochs or 1.0, rows_per_step)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(
        settings.optimizer, model, settings.learning_rate, settings.weight_decay
    )
    factor = LambdaLR(
        optimizer,
        lambda step: schedule_factor(settings.schedule, step / steps, settings.warmup),
    )
    trainer = SafeTrainer(
        model=model,
        args=_training_arguments(settings, model.config, steps, held_out is not None),
        train_dataset=rows,
        eval_dataset=held_rows,
        data_collator=collate,
        processing_class=tokens,
        optimizers=(optimizer, factor),
        bad_step=settings.bad_step,
    )
    if settings.log_experts or model.config.router_bias_update_rate:
        balance_experts(trainer)
    return trainer


def _training_arguments(
    settings: Settings, config: KimiLinearConfig, steps: int, is_evaluated: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        logging_steps=settings.log_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 0,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="steps" if settings.eval_every and is_evaluated else "no",
        eval_steps=settings.eval_every,
        bf16=settings.bf16,
        report_to=settings.report_to,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=settings.seed,
        use_cache=config.use_cache,  # Trainer writes it to the configuration, which is saved
    )


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


def _load_texts(settings: Settings) -> Texts:
    paths, dataset, column = settings.paths, settings.dataset, settings.text_column
    if bool(paths) == (dataset is not None):
        raise ValueError("give either files and folders or a dataset, one of the two")
    if dataset is None:
        files = find_files([Path(path) for path in paths], settings.pattern_glob)
        return Dataset.from_dict({column: list(read_files(files))})
    texts = load_dataset(
        dataset, settings.dataset_config, split=settings.split, streaming=settings.streaming
    )
    names = texts.column_names or list(next(iter(texts)))
    if column not in names:
        raise ValueError(f"text_column={column!r} is not allowed: {dataset} has {', '.join(names)}")
    return texts.select_columns([column])


def _load_tokenizer(
    settings: Settings, checkpoint: str | None, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for; a new one is trained on the texts, kept in the output."""
    given, vocab_size = settings.tokenizer or settings.init_from, settings.vocab_size
    if given is None and checkpoint is not None:
        return AutoTokenizer.from_pretrained(checkpoint)
    if given is not None:
        if vocab_size is not None:
            raise ValueError(f"vocab_size={vocab_size} is for a new tokenizer, but one is given")
        return AutoTokenizer.from_pretrained(given)
    if vocab_size is None:
        raise ValueError("give a tokenizer, or the vocab_size of a new one")
    ranks = train_bpe(itertools.islice(filter(None, texts), TOKENIZER_TEXTS), vocab_size)
    length = max(32768, settings.sequence_length)
    return convert_tiktoken(ranks, settings.output, eos_token="[EOS]", model_max_length=length)


def _load_model(
    settings: Settings, checkpoint: str | None, tokenizer: PreTrainedTokenizerBase
) -> KimiLinearForCausalLM:
    """The model to train: given weights, or new ones; those of the checkpoint to go on from."""
    config, init_from = settings.config, settings.init_from
    _at_most_one(preset=settings.preset, config=config, init_from=init_from)
    if checkpoint is not None:
        # its configuration counts, not the preset's
        return KimiLinearForCausalLM.from_pretrained(checkpoint)
    if init_from is not None:
        model = KimiLinearForCausalLM.from_pretrained(init_from)
        check_ids(tokenizer, model, init_from)
        return model
    ids = special_ids(tokenizer)
    if config is not None:
        fields = json.loads(Path(config).read_text(encoding="utf-8"))
        made = KimiLinearConfig(**{**fields, **ids})
    else:
        made = KimiLinearConfig.from_preset(settings.preset or "2m", **ids)
    _say_of_engines(made)
    torch.manual_seed(settings.seed)
    return KimiLinearForCausalLM(made)


def _say_of_engines(config: KimiLinearConfig) -> None:
    """What other engines would take otherwise, while it can still be changed."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    for engine, (version, _) in ENGINES.items():
        for problem in engine_problems(config, engine):
            say(f"{engine} {version}: {problem}")


def _set_router_training(model: KimiLinearForCausalLM, settings: Settings) -> None:
    """Put what is given in place of the configuration's."""
    for field in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
        value = getattr(settings, field)
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


def _parser() -> Any:
    parser = command_parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="FILE_OR_DIR", help="texts, one per file")
    parser.add_argument("--output", required=True, metavar="DIR", help="for the finished model")
    add_flags(parser, Settings)
    return parser


if __name__ == "__main__":
    run_main(main, _parser())
