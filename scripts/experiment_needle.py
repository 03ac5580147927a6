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

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from experiments.runs import Clock, Lines
from experiments.side_by_side import SideBySide, VariantSettings
from experiments.tasks import IGNORED
from experiments.text import Corpus, random_pieces
from experiments.training import Learner
from experiments.variants import full_layers
from measuring.autotuning import limit_autotuning
from options.settings import command_parser, require, run_main, setting
from torch import Tensor

PATTERNS = {"hybrid": "3:1", "kda": "1:0", "mla": "0:1", "mla-rope": "0:1-rope"}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# A pair takes four places in the text, a question two, and its answer one.
PAIR_TOKENS, QUESTION_TOKENS = 4, 4
# One row in so many is trained on its text too: more, and the text's loss drowns the answers'.
TEXT_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Settings(VariantSettings):
    """What is trained and asked."""

    models: Sequence[str] = setting(tuple(PATTERNS), choices=PATTERNS)
    factors: Sequence[int] = setting((1, 2, 4, 8), "test lengths", least=1)
    depths: Sequence[float] = setting(DEPTHS, "from 0 to 1", least=0, most=1)
    pairs: int = setting(32, "of a key and a value in a row", least=1)
    repeats: int = setting(2, "how often each is asked for in training", least=1)
    values: int = setting(64, "different values, and parts of keys", least=2)
    rows: int = setting(64, "of a test", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.values**2
        require(self.pairs <= most, "pairs", self.pairs, f"at most --values squared, {most}")
        least = self.pairs * (2 * PAIR_TOKENS + self.repeats * QUESTION_TOKENS)
        allowed = f"at least {least} for --pairs and --repeats"
        require(self.length >= least, "length", self.length, allowed)
        for model in self.models:
            full_layers(PATTERNS[model], self.layers)  # says what is wrong with the depth


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


class Battery(SideBySide):
    """Trains all patterns side by side with one seed, then asks them.

    Args:
        settings: What is trained and asked.
        corpus: The text, on the device.
        lines: Where the figures go.
    """

    settings: Settings

    def __init__(self, settings: Settings, corpus: Corpus, lines: Lines) -> None:
        sizes = corpus.vocab_size, settings.pairs, settings.values, settings.repeats
        self.train_text, self.test_text = (
            Haystack(tokens, *sizes) for tokens in (corpus.train, corpus.held_out)
        )
        super().__init__(settings, self.train_text.vocab_size, corpus.train.device, lines)

    def run(self, models: Sequence[str], seed: int, clock: Clock) -> None:
        """Train and ask; half of the time that is left at most is for training."""
        start = time.monotonic()
        learners = {model: self.learner(PATTERNS[model], seed) for model in models}
        generator = torch.Generator(self.device).manual_seed(2 * seed)

        def sample(count: int) -> tuple[Tensor, Tensor]:
            return self.train_text.training_rows(count, self.settings.length, generator)

        def tell_point(model: str, step: int, learner: Learner) -> None:
            accuracy = self._accuracy(learner, seed, self.settings.length, 0.5)
            figures = {"accuracy": accuracy, "train_loss": float(learner.loss)}
            self.lines.tell("point", model=model, seed=seed, step=step, **figures)

        def tell_error(model: str, step: int, error: str) -> None:
            self.lines.tell("run", model=model, seed=seed, steps=step, error=error)

        step = self.train(
            learners,
            sample,
            clock.share(2),
            tell_point=tell_point,
            tell_error=tell_error,
            title=f"seed {seed}",
        )
        for model, learner in learners.items():
            self._tell_cells(model, seed, learner, clock)
            figures = self.figures(PATTERNS[model], learner)
            seconds = time.monotonic() - start
            self.lines.tell("run", model=model, seed=seed, steps=step, **figures, seconds=seconds)

    def _tell_cells(self, model: str, seed: int, learner: Learner, clock: Clock) -> None:
        settings = self.settings
        sizes = {"rows": settings.rows, "trained_length": settings.length}
        for factor in sorted(set(settings.factors)):
            for depth in settings.depths:
                length = factor * settings.length
                place = {"model": model, "seed": seed, "length": length, "depth": depth}
                if clock.is_over:
                    self.lines.tell("cell", **place, error="not run: --time-limit is spent")
                    continue
                accuracy = self._accuracy(learner, seed, length, depth)
                self.lines.tell("cell", **place, accuracy=accuracy, **sizes)

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


def main(**options: Any) -> list[Any]:
    """Train every pattern with every seed, and ask for needles.

    Args:
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    clock, where, lines = settings.start("needle")
    limit_autotuning(settings.autotune)
    done = lines.finished("model", "seed")
    text = settings.load_corpus()
    longest = max(settings.factors) * settings.length
    shortest = min(len(text.train), len(text.held_out))
    require(longest <= shortest, "length", settings.length, f"{shortest} tokens with --factors")
    lines.begin(where, settings, train_tokens=len(text.train))
    battery = Battery(settings, text.to(where), lines)
    for i, seed in enumerate(settings.seeds):
        models = [model for model in settings.models if (model, seed) not in done]
        if models and not clock.is_over:
            left = len(settings.seeds) - i
            seconds = clock.share(left) - time.monotonic()
            battery.run(models, seed, Clock(None if seconds == float("inf") else seconds))
    return lines.lines


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
