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

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from experiments.decays import DECAYS, build_with_decays, half_lives
from experiments.layers import MIXERS
from experiments.runs import Lines, RunSettings, parse_share
from experiments.tasks import TASKS, Task, generators
from experiments.training import Learner, Pool, Recipe
from measuring.autotuning import limit_autotuning
from measuring.report import say
from options.settings import command_parser, run_main, setting
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


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What is trained."""

    tasks: Sequence[str] = setting(TASKS, choices=TASKS)
    lengths: Sequence[int] = setting((256, 512, 1024), "tokens", least=1)
    models: Sequence[str] = setting(("kda", "gdn", "mamba2"), choices=MODELS)
    learning_rates: Sequence[float] = setting(LEARNING_RATES, above=0)
    seeds: Sequence[int] = setting((0,), least=0)
    symbols: int | None = setting(None, f"random tokens; default {SYMBOLS}")
    num_heads: int = setting(2, "heads of both layers", least=1)
    head_dim: int = setting(128, "key and value size of a head", least=16, most=256, multiple=16)
    batch_tokens: int = setting(16384, "tokens of a batch", least=1)
    max_steps: int = setting(MAX_STEPS, "steps at most", least=1)
    grid_steps: int = setting(1000, "steps after which only the best learning rates go on", least=1)
    learned: float = setting(0.1, "accuracy of the best by then", least=0, most=1)
    keep: int = setting(1, "how many of them", least=1)
    eval_every: int = setting(100, "steps between two points", least=1)
    eval_rows: int = setting(64, "sequences of a point", least=1)
    target: float = setting(0.99, "accuracy at which training ends", above=0, most=1)
    warmup: int = setting(100, "steps over which the learning rate rises", least=0)
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    record: bool = setting(True, "steps as CUDA graphs")
    share: tuple[int, int] = setting(
        (0, 1), "groups I, I + N, ...", parse=parse_share, metavar="I/N", recorded=False
    )
    autotune: int = setting(2, "choices of autotuners; 0: all", least=0, recorded=False)
    experiment: str = setting(EXPERIMENTS[0], choices=EXPERIMENTS, recorded=False)

    def __post_init__(self) -> None:
        super().__post_init__()
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


def main(**options: Any) -> list[Any]:
    """Train every group that has no figures yet; each gets its share of the time that is left.

    Args:
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    limit_autotuning(settings.autotune)
    clock, where, lines = settings.start(settings.experiment)
    lines.begin(where, settings)
    groups = [
        {"task": task, "length": length, "seed": seed}
        for seed in settings.seeds
        for length in settings.lengths
        for task in settings.tasks
    ][settings.share[0] :: settings.share[1]]
    groups = [place for place in groups if not _is_done(place, settings.models, lines.before)]
    if groups and where.type == "cuda":
        _compile(settings, groups[0], lines, where)
    for i, place in enumerate(groups):
        if clock.is_over:
            say(f"{place}: not run, --time-limit is spent")
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


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
