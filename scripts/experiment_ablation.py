"""The report's ablations (arXiv 2510.26692, section 5.2 and table 1) at a size that trains in
seconds on one GPU: the ratio of KDA to MLA layers, output gate, convolution, and positions.

Language models on the source of Python's standard library, with a tokenizer trained on it. The
variants (`experiments/variants.py`) see the same tokens in the same order, have about as many
parameters, and share one recipe, which was not tuned for any of them. Validation loss is that on
all held-out files, in rows as long as in training.

Embeddings begin with a standard deviation of 0.32, --embedding-scale times the usual one. At 0.02 a
layer's first output is many times its input, more so behind a sigmoid gate than behind a SiLU one:
for some hundred steps variants then differ by that more than by anything else.

A check that it runs, on a CPU, and some minutes on one GPU:

    python scripts/experiment_ablation.py --variants 3:1,0:1 --layers 4 --heads 2 --head-dim 16 \\
        --length 64 --batch-tokens 512 --steps 20 --vocab-size 512
    python scripts/experiment_ablation.py --seeds 0,1,2 --time-limit 480 \\
        --output benchmarks/results/experiment_ablation.jsonl

Lines: "run", the end of one training; "point", losses on the way. What is in the file already is
not trained again, so another --embedding-scale needs another file.
"""

import argparse
import math
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
    limit_autotuning,
    names,
    require,
    require_some,
    run_main,
    say,
)
from experiments.text import Corpus, random_pieces, rows_of
from experiments.training import Learner, Pool, Recipe
from experiments.variants import (
    VARIANTS,
    build_variant,
    count_parameters,
    full_layers,
    matched_width,
)
from measuring.settings import numbers
from torch import Tensor
from tqdm import tqdm

EXPERIMENT = "ablation"
POOL_BATCHES = 16


@dataclass
class Settings:
    """What is trained; see the flags of the same names."""

    variants: Sequence[str] = VARIANTS
    seeds: Sequence[int] = (0, 1)
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    length: int = 512
    batch_tokens: int = 16384
    steps: int = 400
    eval_every: int = 100
    parallel: int = 3
    learning_rate: float = 2e-3
    warmup: int = 50
    vocab_size: int = 4096
    embedding_scale: float = 16.0

    def __post_init__(self) -> None:
        require_some("variants", self.variants, VARIANTS)
        is_allowed = len(self.seeds) > 0 and min(self.seeds) >= 0
        require(is_allowed, "seeds", self.seeds, "one or more integers of at least 0")
        for name in ("layers", "heads", "batch_tokens", "steps", "eval_every", "parallel"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        allowed = "a multiple of 16 from 16 to 256"
        is_allowed = 16 <= self.head_dim <= 256 and self.head_dim % 16 == 0
        require(is_allowed, "head_dim", self.head_dim, allowed)
        require(8 <= self.length <= 1024, "length", self.length, "from 8 to 1024")
        require(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(self.vocab_size >= 512, "vocab_size", self.vocab_size, "at least 512")
        require(self.embedding_scale > 0, "embedding_scale", self.embedding_scale, "above 0")
        for variant in self.variants:
            full_layers(variant, self.layers)  # says what is wrong with the depth

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "num_layers": self.layers,
            "num_heads": self.heads,
            "head_dim": self.head_dim,
        }

    def recipe(self, device: torch.device) -> Recipe:
        return Recipe(
            self.learning_rate,
            warmup=self.warmup,
            decay_steps=(int(0.6 * self.steps), self.steps),
            is_bfloat16=device.type == "cuda",
        )


class Battery:
    """Trains variants side by side on the same tokens.

    Args:
        settings: What is trained.
        corpus: The text, on the device.
        lines: Where the figures go.
    """

    def __init__(self, settings: Settings, corpus: Corpus, lines: Lines) -> None:
        self.settings, self.corpus, self.lines = settings, corpus, lines
        self.device = corpus.train.device
        self.rows = max(1, settings.batch_tokens // settings.length)
        self.held_out = rows_of(corpus.held_out, settings.length + 1)
        base = build_variant("3:1", corpus.vocab_size, 0, **settings.sizes)
        self.target = count_parameters(base)

    def train(self, variants: Sequence[str], seed: int, deadline: float) -> None:
        """Train some variants with one seed; those not done by the deadline are left out."""
        settings, start = self.settings, time.monotonic()
        learners = {variant: self._learner(variant, seed) for variant in variants}
        generator = torch.Generator(self.device).manual_seed(seed)
        pool = Pool(lambda count: self._sample(count, generator), self.rows, POOL_BATCHES)
        title = f"seed {seed}: {' '.join(variants)}"
        for step in tqdm(range(1, settings.steps + 1), desc=title, mininterval=5):
            ids, labels = pool.batch()
            for variant in [v for v, x in learners.items() if not x.attempt(ids, labels)]:
                error = learners.pop(variant).error
                self.lines.tell("run", variant=variant, seed=seed, step=step, error=error)
            if step % settings.eval_every == 0 or step == settings.steps:
                for variant, learner in learners.items():
                    self._tell(variant, seed, step, learner, time.monotonic() - start)
                if time.monotonic() > deadline:
                    say(f"{title}: ended at step {step}, --time-limit is spent")
                    return

    def _learner(self, variant: str, seed: int) -> Learner:
        sizes, vocab_size = self.settings.sizes, self.corpus.vocab_size
        width = matched_width(variant, self.target, vocab_size, **sizes)
        scale = self.settings.embedding_scale
        model = build_variant(
            variant, vocab_size, seed, width=width, embedding_scale=scale, **sizes
        ).to(self.device)
        shape = (self.rows, self.settings.length)
        learner = Learner(model, self.settings.recipe(self.device), shape)
        if learner.graph_error:
            say(f"{variant}: the step is not recorded: {learner.graph_error}")
        return learner

    def _sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pieces = random_pieces(self.corpus.train, count, self.settings.length + 1, generator)
        return pieces[:, :-1], pieces[:, 1:]

    def _validation_loss(self, learner: Learner) -> float:
        losses = [
            (learner.loss_of(rows[:, :-1], rows[:, 1:]), len(rows))
            for rows in self.held_out.split(self.rows)
        ]
        return sum(float(loss) * count for loss, count in losses) / len(self.held_out)

    def _tell(self, variant: str, seed: int, step: int, learner: Learner, seconds: float) -> None:
        settings, loss = self.settings, self._validation_loss(learner)
        place = {"variant": variant, "seed": seed, "step": step}
        figures = {
            "train_loss": float(learner.loss),
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss),
        }
        self.lines.tell("point", **place, **figures)
        if step < settings.steps:
            return
        self.lines.tell(
            "run",
            **place,
            **figures,
            parameters=count_parameters(learner.model),
            full_layers=list(full_layers(variant, settings.layers)),
            mlp_width=learner.model.config.intermediate_size,
            tokens=step * self.rows * settings.length,
            embedding_scale=settings.embedding_scale,
            is_recorded=learner.graph is not None,
            seconds=seconds,
        )


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
    """Train every variant with every seed.

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
    done = lines.finished("variant", "seed")
    text = Corpus.load(settings.vocab_size, None if corpus is None else Path(corpus))
    sizes = {"train_tokens": len(text.train), "held_out_tokens": len(text.held_out)}
    lines.begin(where, commit, **vars(settings), **sizes)
    battery = Battery(settings, text.to(where), lines)
    for seed in settings.seeds:
        left = [variant for variant in settings.variants if (variant, seed) not in done]
        for start in range(0, len(left), settings.parallel):
            variants = left[start : start + settings.parallel]
            if clock.is_over:
                say(f"seed {seed}: {' '.join(variants)}: not run, --time-limit is spent")
                continue
            battery.train(variants, seed, clock.end)
            if where.type == "cuda":
                torch.cuda.empty_cache()
    return lines.lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Settings()
    add("--variants", type=names, default=VARIANTS, metavar="NAMES", help=", ".join(VARIANTS))
    add("--seeds", type=numbers, default=default.seeds, metavar="N,N")
    counts = {
        "layers": "layers",
        "heads": "heads of every layer",
        "head_dim": "their size",
        "length": "tokens of a row",
        "batch_tokens": "tokens of a batch",
        "steps": "updates",
        "eval_every": "steps between two points",
        "parallel": "variants side by side",
        "warmup": "steps over which the learning rate rises",
        "vocab_size": "of the tokenizer",
    }
    add_counts(add, default, counts)
    add("--learning-rate", type=float, default=default.learning_rate, metavar="X")
    scale = default.embedding_scale
    add("--embedding-scale", type=float, default=scale, metavar="X", help="embeddings' at first")
    add("--autotune", type=int, default=2, metavar="N", help="choices of autotuners; 0: all")
    add("--corpus", metavar="DIR", help="Python files, in place of the standard library")
    add_common(add, "benchmarks/results/experiment_ablation.jsonl")
    return parser


if __name__ == "__main__":
    run_main(main, _parser())
