"""Variants of a model that are trained side by side on the same tokens."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring.report import say
from options.settings import setting
from torch import Tensor
from tqdm import tqdm

from experiments.runs import Lines, RunSettings
from experiments.text import Corpus
from experiments.training import Learner, Pool, Recipe
from experiments.variants import build_variant, count_parameters, full_layers, matched_width

POOL_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class VariantSettings(RunSettings):
    """Sizes and training that all variants share."""

    seeds: Sequence[int] = setting((0,), least=0)
    layers: int = setting(4, "layers", least=1)
    heads: int = setting(4, "heads of every layer", least=1)
    head_dim: int = setting(64, "their size", least=16, most=256, multiple=16)
    length: int = setting(512, "tokens of a row in training", least=8)
    batch_tokens: int = setting(16384, "tokens of a batch", least=1)
    steps: int = setting(3000, "updates", least=1)
    eval_every: int = setting(250, "steps between two points", least=1)
    learning_rate: float = setting(1e-3, above=0)
    warmup: int = setting(100, "steps over which the learning rate rises", least=0)
    vocab_size: int = setting(4096, "of the tokenizer", least=512)
    embedding_scale: float = setting(16.0, "embeddings' at first", above=0)
    autotune: int = setting(2, "choices of autotuners; 0: all", least=0, recorded=False)
    corpus: str | os.PathLike[str] | None = setting(
        None, "Python files, in place of the standard library", metavar="DIR", recorded=False
    )

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_layers": self.layers, "num_heads": self.heads, "head_dim": self.head_dim}

    @property
    def batch_rows(self) -> int:
        """Rows of a batch."""
        return max(1, self.batch_tokens // self.length)

    def load_corpus(self) -> Corpus:
        return Corpus.load(self.vocab_size, None if self.corpus is None else Path(self.corpus))


class SideBySide:
    """Trains variants with about as many parameters as 3:1 has.

    Args:
        settings: How.
        vocab_size: Ids of the models.
        device: Where.
        lines: Where the figures go.
    """

    def __init__(
        self, settings: VariantSettings, vocab_size: int, device: torch.device, lines: Lines
    ) -> None:
        self.settings, self.lines = settings, lines
        self.vocab_size, self.device = vocab_size, device
        self.target = count_parameters(build_variant("3:1", vocab_size, 0, **settings.sizes))

    def learner(self, variant: str, seed: int) -> Learner:
        """A new model of a variant."""
        settings, sizes = self.settings, self.settings.sizes
        width = matched_width(variant, self.target, self.vocab_size, **sizes)
        scale = settings.embedding_scale
        model = build_variant(
            variant, self.vocab_size, seed, width=width, embedding_scale=scale, **sizes
        )
        recipe = Recipe(
            settings.learning_rate,
            warmup=settings.warmup,
            decay_steps=(int(0.6 * settings.steps), settings.steps),
            is_bfloat16=self.device.type == "cuda",
        )
        learner = Learner(model.to(self.device), recipe, (settings.batch_rows, settings.length))
        if learner.graph_error:
            say(f"{variant}: the step is not recorded: {learner.graph_error}")
        return learner

    def figures(self, variant: str, learner: Learner) -> dict[str, Any]:
        """What a variant is, for the line of its end."""
        return {
            "parameters": count_parameters(learner.model),
            "full_layers": list(full_layers(variant, self.settings.layers)),
            "mlp_width": learner.model.config.intermediate_size,
            "is_recorded": learner.graph is not None,
        }

    def train(
        self,
        learners: dict[str, Learner],
        sample: Callable[[int], tuple[Tensor, Tensor]],
        deadline: float,
        *,
        tell_point: Callable[[str, int, Learner], None],
        tell_error: Callable[[str, int, str], None],
        title: str,
    ) -> int:
        """All steps, or those until the deadline of `time.monotonic()`.

        Args:
            learners: By name; those that fail are taken out.
            sample: Makes a number of rows of ids and labels.
            tell_point: Called with name, step and learner at every point.
            tell_error: Called with name, step and message of a learner that fails.
            title: Of the progress bar.

        Returns:
            The last step.
        """
        settings, step = self.settings, 0
        pool = Pool(sample, settings.batch_rows, POOL_BATCHES)
        for step in tqdm(range(1, settings.steps + 1), desc=title, mininterval=5):
            ids, labels = pool.batch()
            for name in [name for name, x in learners.items() if not x.attempt(ids, labels)]:
                tell_error(name, step, learners.pop(name).error)
            if step % settings.eval_every == 0 or step == settings.steps:
                for name, learner in learners.items():
                    tell_point(name, step, learner)
                if time.monotonic() > deadline:
                    say(f"{title}: ended at step {step}, its part of --time-limit is spent")
                    break
        return step
