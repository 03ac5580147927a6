"""The main job, end to end on a CPU: tokenizer, training, evaluation, saving, generation.

Trains a byte-level BPE and a small Kimi Linear on the source of Python's standard library, whole
modules held out. Then compares the bits per byte on the held-out modules with `zlib -9`, `lzma` and
a trigram model, draws the curves, and has a new process, which cannot import this package, load the
saved folder with `trust_remote_code=True` and write code.

    python scripts/demo.py                          # 300 steps, under 6 minutes on 2 cores
    python scripts/demo.py --steps 2000             # a better model
    python scripts/demo.py --minutes 4              # as good as the machine makes it in that time
    python scripts/demo.py --prompt 'def quicksort(' --output runs/mine

Steps and seed are fixed: the default gives the same model on every machine, but for rounding. The
text is the running interpreter's library, so another version of Python gives other figures.

The last line of the output is one JSON document; `results.json` in the output folder has it too.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from learning.budget import Budget, BudgetCallback
from learning.optimizers import make_optimizer, schedule_factor
from learning.plots import plot_training
from learning.rows import collate, pack
from learning.tokens import special_ids
from options.settings import command_parser, recorded, run_main, setting
from texts.baselines import TrigramModel, lzma_bits_per_byte, zlib_bits_per_byte
from texts.corpus import SourceFile, split_by_file, standard_library, total_bytes
from texts.evaluation import bits_per_byte, encode_texts
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.tokenizer import convert_tiktoken, save_tokenizer, train_bpe

GENERATE = Path(__file__).with_name("generate.py")
PROMPT = 'class PriorityQueue:\n    """A queue that returns its smallest item first."""\n\n    def '
STEPS = 300
SAMPLE_ROWS = 16
LOSSES_PER_RUN = 200


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo trains, and what the trained model writes."""

    output: str | os.PathLike[str] = setting("runs/demo", metavar="DIR", recorded=False)
    minutes: float | None = setting(None, "training time instead of steps", recorded=False)
    steps: int | None = setting(None, f"training steps (default: {STEPS})", recorded=False)
    preset: str = setting("2m", "size of the model", recorded=False)
    config_overrides: dict[str, Any] | None = setting(
        None, "fields that replace the preset's", parse=json.loads, metavar="JSON", recorded=False
    )
    vocab_size: int = setting(4096, "token ids, 256 special ones among them")
    sequence_length: int = setting(512, "tokens per row")
    batch_size: int = setting(8, "rows per step")
    learning_rate: float = setting(6e-3, "the highest one")
    weight_decay: float = setting(0.1, "of matrices")
    optimizer: str = setting("muon", "muon or adamw")
    schedule: str = setting("wsd", "wsd, cosine or constant")
    threads: int | None = setting(None, "CPU threads", recorded=False)
    seed: int = setting(0, "of weights and the order of the data")
    corpus: str | os.PathLike[str] | None = setting(
        None, "Python files instead of the library's", metavar="DIR", recorded=False
    )
    prompt: str = setting(PROMPT, "what the saved model continues", recorded=False)
    max_new_tokens: int = setting(160, "how far it does", recorded=False)
    record: str | os.PathLike[str] | None = setting(
        None, "append the results as a JSON line", metavar="FILE", recorded=False
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids, each with its end token, and their length in bytes."""

    ids: list[list[int]]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(ids) for ids in self.ids)


def main(**values: Any) -> dict[str, Any]:
    """Run the demo.

    Args:
        **values: Fields of `Settings`; what is in the output folder is replaced.

    Returns:
        The results: `bits_per_byte` by method, sizes, seconds by stage, what ran where.

    Raises:
        ValueError: For arguments out of range.
        RuntimeError: If the new process fails.
    """
    settings = Settings(**values)
    steps, minutes = settings.steps, settings.minutes
    budget = Budget(STEPS if steps is None and minutes is None else steps, minutes)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = _empty_folder(Path(settings.output))
    clock = _Clock()
    corpus = Path(settings.corpus) if settings.corpus else None
    kept, held_out = split_by_file(standard_library(corpus))
    _say(f"corpus: {_size(kept)} for training, {_size(held_out)} held out")
    tokenizer, train, test = _tokenize(kept, held_out, settings.vocab_size, folder)
    clock.stop("tokenizer")
    overrides = settings.config_overrides or {}
    model = _make_model(settings.preset, tokenizer, settings.seed, overrides)
    curves = _train(
        model, train, test, tokenizer.bos_token_id, settings, budget, folder / "trainer"
    )
    clock.stop("training")
    bits = _all_bits_per_byte(model, tokenizer, train, test, held_out)
    clock.stop("evaluation")
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    _say(f"saved to {folder}; a new process without this package loads it and writes code:\n")
    text = generate_elsewhere(folder, settings.prompt, settings.max_new_tokens, settings.seed)
    clock.stop("generation")
    results = {
        "bits_per_byte": bits,
        "corpus": _corpus_sizes(kept, held_out, train, test),
        "model": {"preset": settings.preset, **overrides, **_parameters(model)},
        "training": {**recorded(settings), **curves.pop("summary")},
        "seconds": clock.seconds,
        "generated": text,
        "versions": _versions(),
    }
    _finish(folder, results, curves, settings.record)
    return results


def generate_elsewhere(folder: Path, prompt: str, max_new_tokens: int, seed: int = 0) -> str:
    """Have a new process, which cannot import this package, load the folder and write.

    The process has its own empty cache of remote code, so only the folder's files can serve it.
    What it writes to stdout is passed on as it comes.

    Args:
        folder: A saved model with its tokenizer.
        prompt: Text to continue, after a begin token.
        max_new_tokens: How far.
        seed: Of the sampling.

    Returns:
        Prompt and continuation.

    Raises:
        RuntimeError: If the process fails; its messages are on stderr.
    """
    # a None in sys.modules makes `import kimi_linear` fail, installed or not
    program = (
        "import os, runpy, sys; sys.modules['kimi_linear'] = None; sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, os.path.dirname(sys.argv[0])); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ["--prompt", prompt, "--begin-token", "--max-new-tokens", str(max_new_tokens)]
    options += ["--temperature", "0.6", "--top-p", "0.95", "--seed", str(seed)]
    command = [sys.executable, "-I", "-c", program, str(GENERATE), str(folder.resolve()), *options]
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "HF_MODULES_CACHE": empty, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, cwd=empty, stdout=subprocess.PIPE)
        assert process.stdout is not None
        received = bytearray()
        while piece := os.read(process.stdout.fileno(), 65536):
            received += piece
            print(piece.decode("utf-8", errors="replace"), end="", flush=True)
        if process.wait() != 0:
            raise RuntimeError(f"loading {folder} in a new process failed: {process.returncode}")
    return received.decode("utf-8", errors="replace")


def _tokenize(
    kept: Sequence[SourceFile], held_out: Sequence[SourceFile], vocab_size: int, folder: Path
) -> tuple[PreTrainedTokenizerFast, Encoded, Encoded]:
    """A tokenizer trained on the training files, and all files encoded with it."""
    ranks = train_bpe((file.text for file in kept), vocab_size)
    tokenizer = convert_tiktoken(ranks, folder, eos_token="[EOS]", model_max_length=32768)
    train, test = (
        Encoded(
            encode_texts(tokenizer, [file.text for file in files]),
            total_bytes(files),
        )
        for files in (kept, held_out)
    )
    _say(
        f"tokenizer: {vocab_size} ids, {train.num_bytes / train.num_tokens:.2f} bytes per token, "
        f"{train.num_tokens:,} tokens for training, {test.num_tokens:,} held out"
    )
    return tokenizer, train, test


def _make_model(
    preset: str, tokenizer: PreTrainedTokenizerFast, seed: int, overrides: dict[str, Any]
) -> KimiLinearForCausalLM:
    torch.manual_seed(seed)
    config = KimiLinearConfig.from_preset(
        preset,
        **{**special_ids(tokenizer), **overrides},
    )
    model = KimiLinearForCausalLM(config)
    pattern = "".join("K" if kind == "linear_attention" else "M" for kind in config.layer_types)
    _say(f"model: {model.num_parameters():,} parameters, layers {pattern} (KDA, MLA)")
    return model


def _train(
    model: KimiLinearForCausalLM,
    train: Encoded,
    test: Encoded,
    begin: int,
    settings: Settings,
    budget: Budget,
    folder: Path,
) -> dict[str, Any]:
    """Train until the budget is used up; the curves and a summary."""
    length = settings.sequence_length
    rows = Dataset.from_list(list(pack(([begin, *ids] for ids in train.ids), length)))
    if len(rows) < settings.batch_size:
        raise ValueError(
            f"batch_size={settings.batch_size} is above the {len(rows)} rows of training text"
        )
    sample = _sample(test, begin, length)
    points: list[tuple[int, float]] = []

    def on_point(step: int, seconds: float) -> str:
        points.append((step, _sample_bits(model, sample, test)))
        return f", held-out sample {points[-1][1]:.3f} bits per byte"

    optimizer = make_optimizer(
        settings.optimizer, model, settings.learning_rate, settings.weight_decay
    )
    factor = LambdaLR(optimizer, lambda _: schedule_factor(settings.schedule, budget.progress()))
    trainer = Trainer(
        model=model,
        args=_trainer_arguments(folder, settings, model.config, budget),
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, factor),
        callbacks=[BudgetCallback(budget, settings.tokens_per_step, on_point)],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # the bar shows the loss
    trainer.train()
    tokens = trainer.state.global_step * settings.tokens_per_step
    summary = {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "epochs": round(tokens / train.num_tokens, 2),
        "seconds": round(budget.seconds, 1),
        "tokens_per_second": round(tokens / budget.seconds),
    }
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "points": points, "summary": summary}


def _trainer_arguments(
    folder: Path, settings: Settings, config: KimiLinearConfig, budget: Budget
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        # the budget ends the training; a clock does not know the number of steps
        max_steps=budget.steps or 10**9,
        logging_steps=max(1, (budget.steps or 1000) // LOSSES_PER_RUN),
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        max_grad_norm=1.0,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        use_cache=config.use_cache,  # Trainer writes it to the configuration, which is saved
    )


def _sample(test: Encoded, begin: int, length: int) -> dict[str, torch.Tensor]:
    """Rows spread evenly over the held-out text, for the curve."""
    rows = list(pack(([begin, *ids] for ids in test.ids), length, keep_rest=True))
    full = [row for row in rows if len(row["input_ids"]) == length] or rows[:1]
    stride = max(1, len(full) // SAMPLE_ROWS)
    return collate(full[::stride][:SAMPLE_ROWS])


@torch.no_grad()
def _sample_bits(
    model: KimiLinearForCausalLM, sample: dict[str, torch.Tensor], test: Encoded
) -> float:
    """Bits per byte that the loss on the sample stands for."""
    model.eval()
    loss = model(**{key: value.to(model.device) for key, value in sample.items()}).loss
    model.train()
    return float(loss) / math.log(2) * test.num_tokens / test.num_bytes


def _all_bits_per_byte(
    model: KimiLinearForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train: Encoded,
    test: Encoded,
    held_out: Sequence[SourceFile],
) -> dict[str, float]:
    """Bits per byte on all held-out files, by method."""
    texts = [file.text for file in held_out]
    trigram = TrigramModel(train.ids, len(tokenizer), tokenizer.bos_token_id)
    bits = {
        "kimi_linear": bits_per_byte(model, test.ids, test.num_bytes, tokenizer.bos_token_id),
        "trigram": trigram.bits(test.ids) / test.num_bytes,
        "lzma": lzma_bits_per_byte(texts),
        "zlib -9": zlib_bits_per_byte(texts),
    }
    _say("\nheld-out bits per byte (less is better)")
    for name, value in bits.items():
        _say(f"  {name:12s} {value:.3f}")
    return {name: round(value, 4) for name, value in bits.items()}


def _finish(
    folder: Path,
    results: dict[str, Any],
    curves: dict[str, Any],
    record: str | os.PathLike[str] | None,
) -> None:
    """Write the figure and the results."""
    bits, training = results["bits_per_byte"], results["training"]
    minutes = training["seconds"] / 60
    plot_training(
        folder / "curve.png",
        curves["losses"],
        curves["points"],
        bits["kimi_linear"],
        {name: value for name, value in bits.items() if name != "kimi_linear"},
        f"Kimi Linear, {results['model']['parameters'] / 1e6:.1f}M parameters, {minutes:.0f} min "
        f"on {results['versions']['threads']} CPU threads",
    )
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    (folder / "results.json").write_text(json.dumps({**results, **curves}, indent=2) + "\n")
    # what push_to_hub.py puts on the model card
    measured = {"held-out bits per byte": bits["kimi_linear"]}
    (folder / "eval_results.json").write_text(json.dumps(measured, indent=2) + "\n")
    line = json.dumps(results)
    if record is not None:
        with open(record, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    _say(f"\ncurves: {folder / 'curve.png'}; all took {sum(results['seconds'].values()):.0f} s")
    print(line)


def _parameters(model: KimiLinearForCausalLM) -> dict[str, int]:
    """All parameters, and those that one token uses, embeddings included."""
    config = model.config
    unused = 1 - config.num_experts_per_token / config.num_experts
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = model.num_parameters()
    return {"parameters": total, "active_parameters": round(total - unused * routed)}


def _corpus_sizes(
    kept: Sequence[SourceFile], held_out: Sequence[SourceFile], train: Encoded, test: Encoded
) -> dict[str, int]:
    return {
        "training_files": len(kept),
        "training_bytes": train.num_bytes,
        "training_tokens": train.num_tokens,
        "held_out_files": len(held_out),
        "held_out_bytes": test.num_bytes,
        "held_out_tokens": test.num_tokens,
    }


def _versions() -> dict[str, str | int]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, stage: str) -> None:
        """End a stage; the next one begins."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._since, 1)
        self._since = now


def _empty_folder(folder: Path) -> Path:
    """The folder, emptied of an earlier run's files; a folder of anything else is refused."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "tiktoken.model").exists():
            raise ValueError(f"output={str(folder)!r} holds other files; allowed: a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _size(files: Sequence[SourceFile]) -> str:
    return f"{len(files)} files with {total_bytes(files) / 1e6:.2f} MB"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
