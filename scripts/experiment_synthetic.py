"""The report's synthetic tasks (arXiv 2510.26692, section 5.1, figure 4), trained and counted.

Palindrome, associative recall with many queries (MQAR) and 64 stacks (`experiments/tasks.py`), for
two layers with two heads of 128: Kimi Delta Attention, Gated DeltaNet, Mamba2 and, if asked for,
latent attention, all in the same blocks (`experiments/layers.py`), on the same batches. Sequences
are new in every step; accuracy is that on the answers of other sequences. Every learning rate of
the report's grid is tried for --grid-steps, and until the model's best one has an accuracy of
--learned: before that noise would choose. Then its best --keep go on. A model that reaches
--target is done, and its other learning rates end with it.

In less than a minute on a CPU, a length at which the difference cannot be seen:

    python scripts/experiment_synthetic.py --tasks mqar --lengths 32 --models kda,gdn \\
        --symbols 16 --head-dim 32 --learning-rates 3e-3 --max-steps 300 --eval-every 50 \\
        --batch-tokens 512

Eight minutes on one GPU; where figures are there already, nothing is done again:

    python scripts/experiment_synthetic.py --lengths 256,512 --max-steps 20000 --time-limit 480 \\
        --output benchmarks/results/experiment_synthetic.jsonl

What of KDA's decay makes the difference to Gated DeltaNet (`experiments/decays.py`):

    python scripts/experiment_synthetic.py --experiment decays --tasks palindrome \\
        --models kda,kda-even,kda-slow,kda-full,gdn,gdn-spread,gdn-slow --lengths 256,512 \\
        --seeds 0,1 --learning-rates 1e-3 --max-steps 3000 --eval-every 50 --time-limit 480 \\
        --output benchmarks/results/experiment_decays.jsonl

`scripts/experiment_report.py` makes the tables and figures. Lines: "point" is the accuracy at a
step, "run" the end of one training, with the tokens that its states' channels take to lose half, at
first and now (quantiles of each layer), and "stopped": target, pruned (another learning rate was
better), beaten (another one was there first), steps (--max-steps), or time (--time-limit).
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from experiments.decays import DECAYS, build_with_decays, half_lives
from experiments.layers import MIXERS
from experiments.runs import (
    Clock,
    Lines,
    add_common,
    add_counts,
    choose_device,
    floats,
    limit_autotuning,
    names,
    parse_share,
    require,
    require_some,
    run_main,
    say,
)
from experiments.tasks import TASKS, Task, generators
from experiments.training import Learner, Pool, Recipe
from measuring.settings import numbers
from torch import Tensor
from tqdm import tqdm

EXPERIMENTS = ("synthetic", "decays")
MODELS = (*MIXERS, *DECAYS)
# Section 5.1.
LEARNING_RATES = (5e-5, 1e-4, 5e-4, 1e-3)
MAX_STEPS = 20_000
SYMBOLS = {"palindrome": 64, "mqar": 512, "stack": 64}
# Batches made at once; a stack's take a loop over all operations, however many they are.
POOL_BATCHES = 32
DECAY_ROWS = 8  # test sequences over which decays are averaged
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class Settings:
    """What is trained; see the flags of the same names."""

    tasks: Sequence[str] = TASKS
    lengths: Sequence[int] = (256, 512, 1024)
    models: Sequence[str] = ("kda", "gdn", "mamba2")
    learning_rates: Sequence[float] = LEARNING_RATES
    seeds: Sequence[int] = (0,)
    symbols: int | None = None
    num_heads: int = 2
    head_dim: int = 128
    batch_tokens: int = 16384
    max_steps: int = MAX_STEPS
    grid_steps: int = 1000
    learned: float = 0.1
    keep: int = 1
    eval_every: int = 100
    eval_rows: int = 64
    target: float = 0.99
    warmup: int = 100
    dtype: str = "auto"
    record: bool = True

    def __post_init__(self) -> None:
        require_some("tasks", self.tasks, TASKS)
        require_some("models", self.models, MODELS)
        require_some("dtype", [self.dtype], DTYPES)
        for name in ("lengths", "learning_rates", "seeds"):
            require(len(getattr(self, name)) > 0, name, getattr(self, name), "one or more numbers")
        rates = self.learning_rates
        require(min(rates) > 0, "learning_rates", rates, "numbers above 0")
        require(min(self.seeds) >= 0, "seeds", self.seeds, "integers of at least 0")
        positive = ("batch_tokens", "max_steps", "grid_steps", "keep", "eval_every", "eval_rows")
        for name in positive:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        require(0 < self.target <= 1, "target", self.target, "above 0 and at most 1")
        require(0 <= self.learned <= 1, "learned", self.learned, "from 0 to 1")
        require(self.num_heads >= 1, "num_heads", self.num_heads, "at least 1")
        allowed = "a multiple of 16 from 16 to 256"
        is_allowed = 16 <= self.head_dim <= 256 and self.head_dim % 16 == 0
        require(is_allowed, "head_dim", self.head_dim, allowed)
        for name in self.tasks:
            for length in self.lengths:
                self.task(name, length)  # says what is wrong with it

    def task(self, name: str, length: int) -> Task:
        return Task(name, length, self.symbols or SYMBOLS[name])


@dataclass
class Trial:
    """One training: a model at one learning rate."""

    model: str
    learning_rate: float
    learner: Learner
    parameters: int
    first_half_lives: list[list[float]]
    accuracies: list[float] = field(default_factory=list)
    train_loss: float = float("inf")
    stopped: str = ""

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better."""
        return max(self.accuracies, default=0.0), -self.train_loss


class Group:
    """All models and learning rates on one task, length and seed, side by side.

    Args:
        settings: What is trained.
        place: task, length and seed, as they stand in the lines.
        lines: Where the figures go.
        device: Where it is trained.
    """

    def __init__(
        self, settings: Settings, place: dict[str, Any], lines: Lines, device: torch.device
    ) -> None:
        self.settings, self.place, self.lines, self.device = settings, place, lines, device
        self.task = settings.task(place["task"], place["length"])
        self.rows = max(1, settings.batch_tokens // self.task.length)
        train, test = generators(place["seed"], device)
        self.pool = Pool(lambda count: self.task.sample(count, train), self.rows, POOL_BATCHES)
        self.test = self.task.sample(settings.eval_rows, test)
        self.start = time.monotonic()

    def run(self, deadline: float) -> None:
        """Train until all are done, or the deadline of `time.monotonic()` is past."""
        settings, trials = self.settings, self.trials()
        self.start, active = time.monotonic(), list(trials)
        where = " ".join(str(value) for value in self.place.values())
        with tqdm(total=settings.max_steps, desc=where, mininterval=5) as bar:
            for step in range(1, settings.max_steps + 1):
                ids, labels = self.pool.batch()
                active = [trial for trial in active if self._step(step, trial, ids, labels)]
                bar.update()
                is_last = step == settings.max_steps
                if step % settings.eval_every and step != settings.grid_steps and not is_last:
                    continue
                self._evaluate(step, active)
                is_late = time.monotonic() > deadline
                self._stop(step, active, "steps" if is_last else "time" if is_late else "")
                active = [trial for trial in active if not trial.stopped]
                if not active:
                    break

    def _step(self, step: int, trial: Trial, ids: Tensor, labels: Tensor) -> bool:
        """One step; False, and a line with "error", if that cannot be done."""
        is_done = trial.learner.attempt(ids, labels)
        if not is_done:
            self.lines.tell("run", **self._name(trial), steps=step, error=trial.learner.error)
        return is_done

    def trials(self) -> list[Trial]:
        """A new model for each kind and learning rate."""
        settings, trials = self.settings, []
        use_bfloat16 = settings.dtype == "bfloat16"
        if settings.dtype == "auto":
            use_bfloat16 = self.device.type == "cuda"
        for mixer in settings.models:
            for rate in settings.learning_rates:
                model = build_with_decays(
                    mixer,
                    self.task.vocab_size,
                    self.place["seed"],
                    num_heads=settings.num_heads,
                    head_dim=settings.head_dim,
                )
                recipe = Recipe(
                    rate,
                    warmup=settings.warmup,
                    is_bfloat16=use_bfloat16,
                    is_recorded=settings.record,
                )
                shape = tuple(self.test[0][:1].expand(self.rows, -1).shape)
                learner = Learner(model.to(self.device), recipe, shape)
                count = sum(parameter.numel() for parameter in model.parameters())
                trials.append(Trial(mixer, rate, learner, count, self._half_lives(learner)))
                if learner.graph_error:
                    say(f"{mixer}: the step is not recorded: {learner.graph_error}")
        return trials

    def _half_lives(self, learner: Learner) -> list[list[float]]:
        return learner.read(lambda model: half_lives(model, self.test[0][:DECAY_ROWS]))

    def _evaluate(self, step: int, active: list[Trial]) -> None:
        """Accuracy on the test sequences, of all models before the host waits for any."""
        found = [(t, t.learner.count_right(*self.test), t.learner.loss) for t in active]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for trial, counts, loss in found:
            right, total = counts.tolist()
            trial.accuracies.append(right / total)
            trial.train_loss = float(loss)
            self.lines.tell(
                "point",
                **self._name(trial),
                step=step,
                accuracy=right / total,
                train_loss=trial.train_loss,
            )

    def _stop(self, step: int, active: list[Trial], reason: str) -> None:
        """Settle who ends here, and tell how."""
        settings = self.settings
        done = {t.model for t in active if t.accuracies[-1] >= settings.target}
        for trial in active:
            rivals = [t for t in active if t.model == trial.model]
            ahead = sum(t.rank > trial.rank for t in rivals)
            has_learned = max(rival.rank for rival in rivals)[0] >= settings.learned
            if trial.accuracies[-1] >= settings.target:
                trial.stopped = "target"
            elif trial.model in done:
                trial.stopped = "beaten"
            elif step >= settings.grid_steps and has_learned and ahead >= settings.keep:
                trial.stopped = "pruned"
            else:
                trial.stopped = reason
        for trial in active:
            if trial.stopped:
                self._tell_end(step, trial)

    def _tell_end(self, step: int, trial: Trial) -> None:
        self.lines.tell(
            "run",
            **self._name(trial),
            stopped=trial.stopped,
            steps=step,
            steps_to_target=step if trial.stopped == "target" else None,
            target=self.settings.target,
            accuracy=trial.accuracies[-1],
            best_accuracy=max(trial.accuracies),
            parameters=trial.parameters,
            rows=self.rows,
            symbols=self.task.symbols,
            is_recorded=trial.learner.graph is not None,
            first_half_lives=trial.first_half_lives,
            half_lives=self._half_lives(trial.learner),
            group_seconds=time.monotonic() - self.start,
        )

    def _name(self, trial: Trial) -> dict[str, Any]:
        return {**self.place, "model": trial.model, "learning_rate": trial.learning_rate}


def main(
    *,
    device: str = "auto",
    time_limit: float | None = None,
    output: str | os.PathLike[str] | None = None,
    commit: str | None = None,
    share: tuple[int, int] = (0, 1),
    autotune: int = 2,
    experiment: str = "synthetic",
    **options: Any,
) -> list[Any]:
    """Train every group that has no figures yet.

    Args:
        device: "auto", "cuda" or "cpu".
        time_limit: Seconds for everything; each group gets its share of what is left.
        output: File to append JSON lines to.
        commit: What is measured, where git cannot tell.
        share: (i, n): only every n-th group from the i-th on, for processes beside each other.
        autotune: Configurations among which Triton's autotuners choose; 0: all.
        experiment: Which of the page's experiments the lines are of.
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings, clock, where = Settings(**options), Clock(time_limit), choose_device(device)
    require_some("experiment", [experiment], EXPERIMENTS)
    limit_autotuning(autotune)
    lines = Lines(experiment, None if output is None else Path(output))
    lines.begin(where, commit, **vars(settings))
    groups = [
        {"task": task, "length": length, "seed": seed}
        for seed in settings.seeds
        for length in settings.lengths
        for task in settings.tasks
    ][share[0] :: share[1]]
    groups = [place for place in groups if not _is_done(place, settings.models, lines.before)]
    if groups and where.type == "cuda":
        _compile(settings, groups[0], lines, where)
    for i, place in enumerate(groups):
        if clock.is_over:
            say(f"{place}: not run, --time-limit {time_limit} is spent")
            continue
        Group(settings, place, lines, where).run(clock.share(len(groups) - i))
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return lines.lines


def _compile(settings: Settings, place: dict[str, Any], lines: Lines, device: torch.device) -> None:
    """Let each model take a step, so that compiling its kernels takes no group's time."""
    start = time.monotonic()
    once = replace(settings, learning_rates=settings.learning_rates[:1])
    group = Group(once, place, lines, device)
    for trial in group.trials():
        if trial.learner.attempt(*group.pool.batch()):
            trial.learner.count_right(*group.test)
        else:
            say(f"{trial.model}: {trial.learner.error}")
    torch.cuda.synchronize()
    lines.tell("compiled", seconds=time.monotonic() - start)


def _is_done(place: dict[str, Any], models: Sequence[str], before: Sequence[Any]) -> bool:
    """Whether every model ended at --target or --max-steps here before."""
    ends = {
        line["model"]
        for line in before
        if line["event"] == "run"
        and "error" not in line
        and all(line[key] == value for key, value in place.items())
        and line["stopped"] in ("target", "steps")
    }
    return set(models) <= ends


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Settings()
    add("--tasks", type=names, default=default.tasks, metavar="NAMES", help=", ".join(TASKS))
    add("--lengths", type=numbers, default=default.lengths, metavar="N,N", help="tokens")
    add("--models", type=names, default=default.models, metavar="NAMES", help=", ".join(MODELS))
    add("--learning-rates", type=floats, default=LEARNING_RATES, metavar="X,X")
    add("--seeds", type=numbers, default=default.seeds, metavar="N,N")
    add("--symbols", type=int, metavar="N", help=f"random tokens; default {SYMBOLS}")
    counts = {
        "num_heads": "heads of both layers",
        "head_dim": "key and value size of a head",
        "batch_tokens": "tokens of a batch",
        "max_steps": "steps at most",
        "grid_steps": "steps after which only the best learning rates go on",
        "keep": "how many of them",
        "eval_every": "steps between two points",
        "eval_rows": "sequences of a point",
        "warmup": "steps over which the learning rate rises",
    }
    add_counts(add, default, counts)
    add("--learned", type=float, default=default.learned, help="accuracy of the best by then")
    add("--target", type=float, default=default.target, help="accuracy at which training ends")
    add("--dtype", default=default.dtype, help=", ".join(DTYPES))
    add("--no-record", dest="record", action="store_false", help="no CUDA graphs")
    add("--share", type=parse_share, default=(0, 1), metavar="I/N", help="groups I, I + N, ...")
    add(
        "--autotune",
        type=int,
        default=2,
        metavar="N",
        help="choices of autotuners; 0: all",
    )
    add("--experiment", default=EXPERIMENTS[0], help=", ".join(EXPERIMENTS))
    add_common(add, "benchmarks/results/experiment_synthetic.jsonl")
    return parser


if __name__ == "__main__":
    run_main(main, _parser())
