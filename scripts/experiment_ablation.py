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

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from experiments.runs import Lines
from experiments.side_by_side import SideBySide, VariantSettings
from experiments.text import Corpus, random_pieces, rows_of
from experiments.training import Learner
from experiments.variants import VARIANTS, full_layers
from measuring.autotuning import limit_autotuning
from measuring.report import say
from options.settings import command_parser, run_main, setting
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings(VariantSettings):
    """What is trained."""

    variants: Sequence[str] = setting(VARIANTS, choices=VARIANTS)
    seeds: Sequence[int] = setting((0, 1), least=0)
    layers: int = setting(8, "layers", least=1)
    length: int = setting(512, "tokens of a row", least=8, most=1024)
    steps: int = setting(400, "updates", least=1)
    eval_every: int = setting(100, "steps between two points", least=1)
    parallel: int = setting(3, "variants side by side", least=1)
    learning_rate: float = setting(2e-3, above=0)
    warmup: int = setting(50, "steps over which the learning rate rises", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for variant in self.variants:
            full_layers(variant, self.layers)  # says what is wrong with the depth


class Battery(SideBySide):
    """Trains variants on random pieces of a text.

    Args:
        settings: What is trained.
        corpus: The text, on the device.
        lines: Where the figures go.
    """

    settings: Settings

    def __init__(self, settings: Settings, corpus: Corpus, lines: Lines) -> None:
        super().__init__(settings, corpus.vocab_size, corpus.train.device, lines)
        self.corpus = corpus
        self.held_out = rows_of(corpus.held_out, settings.length + 1)

    def run(self, variants: Sequence[str], seed: int, deadline: float) -> None:
        """Train some variants with one seed; those not done by the deadline are left out."""
        start = time.monotonic()
        generator = torch.Generator(self.device).manual_seed(seed)

        def sample(count: int) -> tuple[Tensor, Tensor]:
            length = self.settings.length + 1
            pieces = random_pieces(self.corpus.train, count, length, generator)
            return pieces[:, :-1], pieces[:, 1:]

        def tell_point(variant: str, step: int, learner: Learner) -> None:
            self._tell(variant, seed, step, learner, time.monotonic() - start)

        def tell_error(variant: str, step: int, error: str) -> None:
            self.lines.tell("run", variant=variant, seed=seed, step=step, error=error)

        self.train(
            {variant: self.learner(variant, seed) for variant in variants},
            sample,
            deadline,
            tell_point=tell_point,
            tell_error=tell_error,
            title=f"seed {seed}: {' '.join(variants)}",
        )

    def _validation_loss(self, learner: Learner) -> float:
        losses = [
            (learner.loss_of(rows[:, :-1], rows[:, 1:]), len(rows))
            for rows in self.held_out.split(self.settings.batch_rows)
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
        if step == settings.steps:
            self.lines.tell(
                "run",
                **place,
                **figures,
                **self.figures(variant, learner),
                tokens=step * settings.batch_rows * settings.length,
                embedding_scale=settings.embedding_scale,
                seconds=seconds,
            )


def main(**options: Any) -> list[Any]:
    """Train every variant with every seed.

    Args:
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    clock, where, lines = settings.start("ablation")
    limit_autotuning(settings.autotune)
    done = lines.finished("variant", "seed")
    text = settings.load_corpus()
    sizes = {"train_tokens": len(text.train), "held_out_tokens": len(text.held_out)}
    lines.begin(where, settings, **sizes)
    battery = Battery(settings, text.to(where), lines)
    for seed in settings.seeds:
        left = [variant for variant in settings.variants if (variant, seed) not in done]
        for start in range(0, len(left), settings.parallel):
            variants = left[start : start + settings.parallel]
            if clock.is_over:
                say(f"seed {seed}: {' '.join(variants)}: not run, --time-limit is spent")
                continue
            battery.run(variants, seed, clock.end)
            if where.type == "cuda":
                torch.cuda.empty_cache()
    return lines.lines


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
