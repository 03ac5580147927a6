"""A needle in a haystack by depth and length, beyond the length of training, for Kimi Linear's
pattern, KDA alone, and latent attention (MLA) alone, without positions and with rotary ones.

Small models are trained from scratch to look values up: rows of the source of Python's standard
library, in which pairs of a two-part key and a value stand at random places, and at whose end
keys are asked for. Keys and values are ids of their own, so a pair stands out from the text. In one
row of sixteen the text is predicted too, elsewhere only the values. Then one pair is put at a given
depth of a longer text, the others at random places, and asked for. Chance is one in --values.

That is retrieval as it was practised, at lengths that were not; it says nothing about what a large
language model of one of these patterns learns from text alone.

A check that it runs, on a CPU, and some minutes on one GPU:

    python scripts/experiment_needle.py --models hybrid --layers 4 --heads 2 --head-dim 16 \\
        --length 64 --pairs 2 --steps 20 --batch-tokens 512 --rows 8 --vocab-size 512
    python scripts/experiment_needle.py --time-limit 480 \\
        --output benchmarks/results/experiment_needle.jsonl

Lines: "point", accuracy at the trained length on the way; "cell", accuracy at a depth and length;
"run", the end of one training.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experiments.runs import (
    Clock,
    Lines,
    add_common,
    add_counts,
    choose_device,
    floats,
    limit_autotuning,
    names,
    require,
    require_some,
    run_main,
    say,
)
from experiments.tasks import IGNORED
from experiments.text import Corpus, random_pieces
from experiments.training import Learner, Pool, Recipe
from experiments.variants import build_variant, count_parameters, full_layers, matched_width
from measuring.settings import numbers
from torch import Tensor
from tqdm import tqdm

EXPERIMENT = "needle"
PATTERNS = {"hybrid": "3:1", "kda": "1:0", "mla": "0:1", "mla-rope": "0:1-rope"}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
POOL_BATCHES = 16
# A pair takes four places in the text, a question two, and its answer one.
PAIR_TOKENS, QUESTION_TOKENS = 4, 4
# One row in so many is trained on its text too: more, and the text's loss drowns the answers'.
TEXT_ROWS = 16


@dataclass
class Settings:
    """What is trained and asked; see the flags of the same names."""

    models: Sequence[str] = tuple(PATTERNS)
    seeds: Sequence[int] = (0,)
    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    length: int = 512
    factors: Sequence[int] = (1, 2, 4, 8)
    depths: Sequence[float] = DEPTHS
    pairs: int = 32
    repeats: int = 2
    values: int = 64
    rows: int = 64
    batch_tokens: int = 16384
    steps: int = 3000
    eval_every: int = 250
    learning_rate: float = 1e-3
    warmup: int = 100
    vocab_size: int = 4096
    embedding_scale: float = 16.0

    def __post_init__(self) -> None:
        require_some("models", self.models, PATTERNS)
        for name in ("seeds", "factors", "depths"):
            require(len(getattr(self, name)) > 0, name, getattr(self, name), "one or more numbers")
        require(min(self.seeds) >= 0, "seeds", self.seeds, "integers of at least 0")
        require(min(self.factors) >= 1, "factors", self.factors, "integers of at least 1")
        is_allowed = all(0 <= depth <= 1 for depth in self.depths)
        require(is_allowed, "depths", self.depths, "numbers from 0 to 1")
        positive = ("layers", "heads", "pairs", "repeats", "rows", "batch_tokens", "steps")
        for name in (*positive, "eval_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        allowed = "a multiple of 16 from 16 to 256"
        is_allowed = 16 <= self.head_dim <= 256 and self.head_dim % 16 == 0
        require(is_allowed, "head_dim", self.head_dim, allowed)
        require(self.values >= 2, "values", self.values, "at least 2")
        most = self.values**2
        require(self.pairs <= most, "pairs", self.pairs, f"at most --values squared, {most}")
        least = self.pairs * (2 * PAIR_TOKENS + self.repeats * QUESTION_TOKENS)
        allowed = f"at least {least} for --pairs and --repeats"
        require(self.length >= least, "length", self.length, allowed)
        require(self.embedding_scale > 0, "embedding_scale", self.embedding_scale, "above 0")
        require(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(self.vocab_size >= 512, "vocab_size", self.vocab_size, "at least 512")
        for model in self.models:
            full_layers(PATTERNS[model], self.layers)  # says what is wrong with the depth

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_layers": self.layers, "num_heads": self.heads, "head_dim": self.head_dim}


class Haystack:
    """Rows of text with pairs in them and questions behind them.

    Ids behind the text's: a mark of a pair, a mark of a question, parts of keys, values.

    Args:
        tokens: The text [N], on the device.
        vocab_size: Ids of the text.
        pairs: Pairs of a row.
        values: How many different values there are, and parts of keys.
        repeats: How often each pair is asked for in training.
    """

    def __init__(
        self, tokens: Tensor, vocab_size: int, pairs: int, values: int, repeats: int = 1
    ) -> None:
        self.tokens, self.pairs, self.values, self.repeats = tokens, pairs, values, repeats
        self.pair_mark, self.question_mark = vocab_size, vocab_size + 1
        self.first_key, self.first_value = vocab_size + 2, vocab_size + 2 + values
        used = vocab_size + 2 + 2 * values
        self.vocab_size = -(-used // 8) * 8

    def training_rows(
        self, count: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Ids and labels [count, length]: all pairs of a row are asked for, in other orders."""
        size = length + 1 - self.repeats * self.pairs * QUESTION_TOKENS
        ids, pairs = self._text(count, size, generator, None)
        rounds = [
            self._shuffled(count, self.pairs, self.pairs, generator) for _ in range(self.repeats)
        ]
        order = torch.cat(rounds, dim=1)
        asked = pairs.gather(1, order.unsqueeze(-1).expand(-1, -1, PAIR_TOKENS)).clone()
        asked[..., 0] = self.question_mark
        row = torch.cat([ids, asked.flatten(1)], dim=1)
        labels = torch.full_like(row, IGNORED)
        labels[:, size + 3 :: QUESTION_TOKENS] = asked[..., -1]
        text_rows = torch.arange(count, device=row.device) % TEXT_ROWS == 0
        is_text = (row < self.pair_mark) & text_rows.unsqueeze(1)
        labels = torch.where(is_text, row, labels)
        return row[:, :-1].contiguous(), labels[:, 1:].contiguous()

    def test_rows(
        self, count: int, length: int, depth: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Ids [count, length], of which the last is a key's, and the values asked for [count].

        Args:
            depth: Where the pair stands that is asked for: 0 at the beginning, 1 at the end.
        """
        ids, pairs = self._text(count, length - QUESTION_TOKENS + 1, generator, depth)
        question = torch.full_like(ids[:, :1], self.question_mark)
        return torch.cat([ids, question, pairs[:, 0, 1:3]], dim=1), pairs[:, 0, 3]

    def _text(
        self, count: int, size: int, generator: torch.Generator, depth: float | None
    ) -> tuple[Tensor, Tensor]:
        """Text [count, size] with pairs in it, and the pairs [count, pairs, 4]; the first of them
        at `depth`."""
        device = generator.device
        ids = random_pieces(self.tokens, count, size, generator)
        slots = size // PAIR_TOKENS  # of a slot's width: no two pairs touch each other's places
        place = self._shuffled(count, slots, self.pairs, generator)
        if depth is not None:
            wanted = round(depth * (slots - 1))
            place = torch.where(place == wanted, place[:, :1], place)
            place[:, 0] = wanted
        keys = self._shuffled(count, self.values**2, self.pairs, generator)
        value = torch.randint(self.values, keys.shape, generator=generator, device=device)
        pairs = torch.stack(
            [
                torch.full_like(keys, self.pair_mark),
                self.first_key + keys // self.values,
                self.first_key + keys % self.values,
                self.first_value + value,
            ],
            dim=-1,
        )
        columns = (place * PAIR_TOKENS).unsqueeze(-1) + torch.arange(PAIR_TOKENS, device=device)
        return ids.scatter(1, columns.flatten(1), pairs.flatten(1)), pairs

    def _shuffled(self, count: int, size: int, chosen: int, generator: torch.Generator) -> Tensor:
        """[count, chosen] different numbers below `size`."""
        scores = torch.rand(count, size, generator=generator, device=generator.device)
        return scores.topk(chosen, dim=1).indices


class Battery:
    """All patterns trained side by side with one seed, then asked.

    Args:
        settings: What is trained and asked.
        corpus: The text, on the device.
        lines: Where the figures go.
    """

    def __init__(self, settings: Settings, corpus: Corpus, lines: Lines) -> None:
        self.settings, self.lines = settings, lines
        self.device = corpus.train.device
        sizes = corpus.vocab_size, settings.pairs, settings.values, settings.repeats
        self.train_text, self.test_text = (
            Haystack(tokens, *sizes) for tokens in (corpus.train, corpus.held_out)
        )
        self.rows = max(1, settings.batch_tokens // settings.length)
        vocab_size = self.train_text.vocab_size
        base = build_variant("3:1", vocab_size, 0, **settings.sizes)
        self.target = count_parameters(base)

    def run(self, models: Sequence[str], seed: int, clock: Clock) -> None:
        """Train and ask; half of the time that is left at most is for training."""
        settings, start = self.settings, time.monotonic()
        learners = {model: self._learner(model, seed) for model in models}
        generator = torch.Generator(self.device).manual_seed(2 * seed)
        length, deadline, step = settings.length, clock.share(2), 0

        def sample(count: int) -> tuple[Tensor, Tensor]:
            return self.train_text.training_rows(count, length, generator)

        pool = Pool(sample, self.rows, POOL_BATCHES)
        for step in tqdm(range(1, settings.steps + 1), desc=f"seed {seed}", mininterval=5):
            ids, labels = pool.batch()
            for model in [m for m, x in learners.items() if not x.attempt(ids, labels)]:
                error = learners.pop(model).error
                self.lines.tell("run", model=model, seed=seed, steps=step, error=error)
            if step % settings.eval_every == 0 or step == settings.steps:
                for model, learner in learners.items():
                    self._tell_point(model, seed, step, learner)
                if time.monotonic() > deadline:
                    say(f"seed {seed}: trained for {step} steps: half of --time-limit is spent")
                    break
        for model, learner in learners.items():
            self._tell_cells(model, seed, step, learner, clock)
            self.lines.tell(
                "run",
                model=model,
                seed=seed,
                steps=step,
                parameters=count_parameters(learner.model),
                full_layers=list(full_layers(PATTERNS[model], settings.layers)),
                mlp_width=learner.model.config.intermediate_size,
                is_recorded=learner.graph is not None,
                seconds=time.monotonic() - start,
            )

    def _learner(self, model: str, seed: int) -> Learner:
        settings, variant = self.settings, PATTERNS[model]
        vocab_size = self.train_text.vocab_size
        width = matched_width(variant, self.target, vocab_size, **settings.sizes)
        scale = settings.embedding_scale
        built = build_variant(
            variant, vocab_size, seed, width=width, embedding_scale=scale, **settings.sizes
        )
        recipe = Recipe(
            settings.learning_rate,
            warmup=settings.warmup,
            decay_steps=(int(0.6 * settings.steps), settings.steps),
            is_bfloat16=self.device.type == "cuda",
        )
        learner = Learner(built.to(self.device), recipe, (self.rows, settings.length))
        if learner.graph_error:
            say(f"{model}: the step is not recorded: {learner.graph_error}")
        return learner

    def _tell_point(self, model: str, seed: int, step: int, learner: Learner) -> None:
        accuracy = self._accuracy(learner, seed, self.settings.length, 0.5)
        loss = float(learner.loss)
        self.lines.tell(
            "point", model=model, seed=seed, step=step, accuracy=accuracy, train_loss=loss
        )

    def _tell_cells(self, model: str, seed: int, step: int, learner: Learner, clock: Clock) -> None:
        settings = self.settings
        for factor in sorted(set(settings.factors)):
            for depth in settings.depths:
                length = factor * settings.length
                place = {"model": model, "seed": seed, "length": length, "depth": depth}
                if clock.is_over:
                    self.lines.tell("cell", **place, error="not run: --time-limit is spent")
                    continue
                accuracy = self._accuracy(learner, seed, length, depth)
                trained = settings.length
                rows = settings.rows
                self.lines.tell(
                    "cell", **place, accuracy=accuracy, rows=rows, trained_length=trained
                )

    def _accuracy(self, learner: Learner, seed: int, length: int, depth: float) -> float:
        """Share of the questions answered right, on held-out text."""
        settings = self.settings
        generator = torch.Generator(self.device).manual_seed(2 * seed + 1)
        ids, answers = self.test_text.test_rows(settings.rows, length, depth, generator)
        rows = max(1, 2 * settings.batch_tokens // length)
        right = [
            learner.predict_last(part) == wanted
            for part, wanted in zip(ids.split(rows), answers.split(rows), strict=True)
        ]
        return float(torch.cat(right).float().mean())


def main(
    *,
    device: str = "auto",
    time_limit: float | None = None,
    output: str | os.PathLike[str] | None = None,
    commit: str | None = None,
    autotune: int = 2,
    corpus: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[Any]:
    """Train every pattern with every seed, and ask for needles.

    Args:
        device: "auto", "cuda" or "cpu".
        time_limit: Seconds for everything.
        output: File to append JSON lines to.
        commit: What is measured, where git cannot tell.
        autotune: Configurations among which Triton's autotuners choose; 0: all.
        corpus: Folder of Python files; None: the standard library.
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings, clock, where = Settings(**options), Clock(time_limit), choose_device(device)
    limit_autotuning(autotune)
    lines = Lines(EXPERIMENT, None if output is None else Path(output))
    done = lines.finished("model", "seed")
    text = Corpus.load(settings.vocab_size, None if corpus is None else Path(corpus))
    longest = max(settings.factors) * settings.length
    shortest = min(len(text.train), len(text.held_out))
    require(longest <= shortest, "length", settings.length, f"{shortest} tokens with --factors")
    lines.begin(where, commit, **vars(settings), train_tokens=len(text.train))
    battery = Battery(settings, text.to(where), lines)
    for i, seed in enumerate(settings.seeds):
        models = [model for model in settings.models if (model, seed) not in done]
        if models and not clock.is_over:
            left = len(settings.seeds) - i
            seconds = clock.share(left) - time.monotonic()
            battery.run(models, seed, Clock(None if seconds == float("inf") else seconds))
    return lines.lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Settings()
    add("--models", type=names, default=default.models, metavar="NAMES", help=", ".join(PATTERNS))
    add("--seeds", type=numbers, default=default.seeds, metavar="N,N")
    add("--factors", type=numbers, default=default.factors, metavar="N,N", help="test lengths")
    add("--depths", type=floats, default=DEPTHS, metavar="X,X", help="from 0 to 1")
    counts = {
        "layers": "layers",
        "heads": "heads of every layer",
        "head_dim": "their size",
        "length": "tokens of a row in training",
        "pairs": "of a key and a value in a row",
        "repeats": "how often each is asked for in training",
        "values": "different values, and parts of keys",
        "rows": "of a test",
        "batch_tokens": "tokens of a batch",
        "steps": "updates",
        "eval_every": "steps between two points",
        "warmup": "steps over which the learning rate rises",
        "vocab_size": "of the tokenizer",
    }
    add_counts(add, default, counts)
    add("--learning-rate", type=float, default=default.learning_rate, metavar="X")
    scale = default.embedding_scale
    add("--embedding-scale", type=float, default=scale, metavar="X", help="embeddings' at first")
    add("--autotune", type=int, default=2, metavar="N", help="choices of autotuners; 0: all")
    add("--corpus", metavar="DIR", help="Python files, in place of the standard library")
    add_common(add, "benchmarks/results/experiment_needle.jsonl")
    return parser


if __name__ == "__main__":
    run_main(main, _parser())
