"""The tables of docs/experiments.md, from the lines of the experiments, the report's figures beside
them (arXiv 2510.26692)."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from measuring.report import Line

# Table 1 of the report: training and validation perplexity.
REPORT_PERPLEXITIES = {
    "3:1": (9.23, 5.65),
    "0:1": (9.45, 5.77),
    "1:1": (9.29, 5.66),
    "7:1": (9.23, 5.70),
    "no-gate": (9.25, 5.67),
    "swish-gate": (9.43, 5.81),
    "no-conv": (9.29, 5.70),
}
VARIANT_NAMES = {
    "3:1": "3:1",
    "0:1": "0:1, MLA only",
    "0:1-rope": "0:1 with RoPE",
    "1:0": "1:0, KDA only",
    "no-gate": "3:1 without output gate",
    "swish-gate": "3:1 with swish output gate",
    "no-conv": "3:1 without convolution",
    "rope": "3:1 with RoPE in MLA",
}
MODEL_NAMES = {"kda": "KDA", "gdn": "Gated DeltaNet", "mamba2": "Mamba2", "mla": "MLA"}
DECAY_NAMES = {
    "kda": "KDA",
    "kda-even": "KDA, a head's channels begin alike",
    "kda-slow": "KDA, slower at first",
    "kda-full": "KDA, full decay matrix",
    "gdn-slow": "Gated DeltaNet, slower at first",
    "gdn-spread": "Gated DeltaNet, a bias for each channel",
    "gdn": "Gated DeltaNet",
}
LONGEST = 100_000  # a half-life of more tokens is no decay
CURVE_STEP = 500  # at which the kinds of decays are compared
PATTERN_NAMES = {
    "hybrid": "3 KDA : 1 MLA",
    "kda": "KDA only",
    "mla": "MLA only",
    "mla-rope": "MLA only, with RoPE",
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def events(lines: Iterable[Line], event: str) -> list[Line]:
    """Lines of one kind that hold figures."""
    return [line for line in lines if line["event"] == event and "error" not in line]


def best_runs(lines: Iterable[Line]) -> dict[tuple[str, int, str], list[Line]]:
    """By task, length and model the best learning rate's run of each seed: the one that was first
    at the target, else the most accurate."""
    found: dict[tuple[str, int, str, int], Line] = {}
    for run in events(lines, "run"):
        key = (run["task"], run["length"], run["model"], run["seed"])
        if key not in found or _quality(run) > _quality(found[key]):
            found[key] = run
    groups: dict[tuple[str, int, str], list[Line]] = {}
    for key in sorted(found):
        groups.setdefault(key[:3], []).append(found[key])
    return groups


def _quality(run: Line) -> tuple[float, float, int]:
    """The more the better; of runs that were cut off, the later one counts if it went further."""
    reached = run["steps_to_target"]
    return -reached if reached else -float("inf"), run["best_accuracy"], run["steps"]


def synthetic_table(lines: Sequence[Line]) -> str:
    """Steps to the target and best accuracy by task, length and model, seeds separated by commas;
    one learning rate where theirs are equal."""
    rows = []
    for (task, length, model), runs in best_runs(lines).items():
        steps = [_steps(run) for run in runs]
        accuracies = [f"{100 * run['best_accuracy']:.1f}" for run in runs]
        rates = [f"{run['learning_rate']:g}" for run in runs]
        rows.append(
            [
                task,
                str(length),
                MODEL_NAMES[model],
                ", ".join(steps),
                ", ".join(accuracies),
                ", ".join(rates if len(set(rates)) > 1 else rates[:1]),
                ", ".join(str(run["seed"]) for run in runs),
            ]
        )
    head = ("task", "tokens", "model", "steps to 99 %", "best accuracy, %", "learning rate", "seed")
    return markdown(head, rows)


def _steps(run: Line) -> str:
    if run["steps_to_target"]:
        return f"{run['steps_to_target']:,}"
    return f"not in {run['steps']:,}"


def decays_table(lines: Sequence[Line]) -> str:
    """Steps to the target, accuracy on the way, and half-lives by task, length and kind."""
    runs, rows = best_runs(lines), []
    places = dict.fromkeys((task, length) for task, length, _ in runs)
    for task, length in places:
        for model, name in DECAY_NAMES.items():
            if (task, length, model) not in runs:
                continue
            found = runs[task, length, model]
            rows.append(
                [
                    task,
                    str(length),
                    name,
                    ", ".join(_steps(run) for run in found),
                    ", ".join(_accuracy_at(lines, run, CURVE_STEP) for run in found),
                    "; ".join(_half_lives(run["first_half_lives"]) for run in found),
                    "; ".join(_half_lives(run["half_lives"]) for run in found),
                ]
            )
    head = (
        "task",
        "tokens",
        "model",
        "steps to 99 %, by seed",
        f"accuracy after {CURVE_STEP} steps, %",
        "half-lives at first, tokens",
        "half-lives at the end",
    )
    return markdown(head, rows)


def _accuracy_at(lines: Sequence[Line], run: Line, step: int) -> str:
    keys = ("task", "length", "seed", "model", "learning_rate")
    for point in events(lines, "point"):
        if point["step"] == step and all(point[key] == run[key] for key in keys):
            return f"{100 * point['accuracy']:.1f}"
    return "-"


def _half_lives(layers: Sequence[Sequence[float]]) -> str:
    """The middle channel's, by layer."""
    return ", ".join(f"{middle:,.0f}" if middle < LONGEST else "none" for _, middle, _ in layers)


def decoding_table(lines: Sequence[Line]) -> str:
    """Cache, one row, and as many rows as fit, by context; then the same with packed weights."""
    found: dict[tuple[str, int, str], list[Line]] = {}
    for line in events(lines, "decode"):
        key = line.get("quantize", ""), line["context"], line["model"]
        found.setdefault(key, []).append(line)
    forms = list(dict.fromkeys(form for form, _, _ in found))
    rows = []
    for form, context in sorted(
        {key[:2] for key in found}, key=lambda place: (forms.index(place[0]), place[1])
    ):
        pair = [found.get((form, context, model), []) for model in ("kimi", "mla")]
        one = [next((x for x in side if x["rows"] == 1), None) for side in pair]
        most = [max(side, key=lambda x: x["rows"], default=None) for side in pair]
        rows.append(
            [
                f"{context:,}" + (f", {form}" if form else ""),
                _pair(one, lambda x: x["cache_bytes_needed"] / 1e9, "{:.2f}"),
                _pair(one, lambda x: x["ms_per_token"], "{:.2f}"),
                _pair(one, lambda x: x["limit_ms"], "{:.2f}"),
                " and ".join(_rows(x) for x in most),
                _pair(most, lambda x: x["ms_per_token"], "{:.2f}"),
            ]
        )
    head = (
        "tokens",
        "cache of a row, GB",
        "one row, ms a token",
        "limit of that, ms",
        "rows that fit",
        "these, ms a token of all",
    )
    return markdown(head, rows)


def _rows(line: Line | None) -> str:
    return "-" if line is None else str(line["rows"])


def _pair(pair: Sequence[Line | None], figure: Callable[[Line], float], form: str) -> str:
    """ "a, b (ratio)" of Kimi Linear and MLA; "-" for what is missing."""
    values = [None if line is None else figure(line) for line in pair]
    texts = ["-" if value is None else form.format(value) for value in values]
    kimi, mla = values
    ratio = "" if not kimi or mla is None else f" ({mla / kimi:.1f})"
    return f"{texts[0]}, {texts[1]}{ratio}"


def kernels_table(lines: Sequence[Line]) -> str:
    """A table for each pass: milliseconds by length, and DPLR's time over KDA's."""
    times: dict[tuple[int, str, str], float] = {}
    for line in events(lines, "kernel"):
        times[line["length"], line["pass"], line["operator"]] = line["ms"]
    tables = []
    for kind in ("forward", "forward+backward"):
        rows = []
        for length in sorted({key[0] for key in times}):
            cells = [f"{length:,}"]
            for end in ("", "-safe"):
                kda, dplr = (times.get((length, kind, name + end)) for name in ("kda", "dplr"))
                cells += [_ms(kda), _ms(dplr), f"{dplr / kda:.2f}" if kda and dplr else "-"]
            rows.append([*cells, _ms(times.get((length, kind, "package")))])
        names = ("KDA", "DPLR", "ratio")
        safe = [f"bounded: {name}" for name in names]
        head = (f"{kind}, ms; tokens", *names, *safe, "KDA as layers call it")
        tables.append(markdown(head, rows))
    apart = [
        f"{line['operator']} {line['relative_error']:.1e}" for line in events(lines, "agreement")
    ]
    if apart:
        tables.append(f"Difference from `kda`, root mean squares' ratio: {', '.join(apart)}.")
    return "\n\n".join(tables)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


Groups = dict[str, list[Line]]


def ablation_groups(lines: Sequence[Line]) -> dict[tuple[float, int], Groups]:
    """Runs by variant, of every seed the last one; by how much larger embeddings were at first, and
    by tokens: the largest first, then the shortest."""
    found: dict[tuple[float, int], dict[str, dict[int, Line]]] = {}
    for run in _with_first_reading(lines):
        recipe = run.get("embedding_scale", 1.0), run["tokens"]
        found.setdefault(recipe, {}).setdefault(run["variant"], {})[run["seed"]] = run
    return {
        recipe: {variant: list(runs.values()) for variant, runs in found[recipe].items()}
        for recipe in sorted(found, key=lambda recipe: (-recipe[0], recipe[1]))
    }


def _with_first_reading(lines: Iterable[Line]) -> list[Line]:
    """Runs, with "first_reading": tokens and validation loss of the last point before any text was
    read a second time; None where there was no point so early."""
    settings: Mapping[str, Any] = {}
    early: dict[tuple[str, int], tuple[int, float]] = {}
    runs = []
    for line in lines:
        if line["event"] == "environment":
            settings, early = line.get("settings", {}), {}
        elif line["event"] == "point":
            tokens = line["step"] * settings.get("batch_tokens", 0)
            if 0 < tokens <= settings.get("train_tokens", 0):
                early[line["variant"], line["seed"]] = tokens, line["validation_loss"]
        elif line["event"] == "run" and "error" not in line:
            first = early.pop((line["variant"], line["seed"]), None)
            runs.append({**line, "first_reading": first})
    return runs


def recipe_name(recipe: tuple[float, int]) -> str:
    """What a recipe is, in words."""
    scale, tokens = recipe
    return f"embeddings of {0.02 * scale:g} at first, {tokens / 1e6:.1f}M tokens"


def ablation_table(lines: Sequence[Line]) -> str:
    """A table for each recipe."""
    return "\n\n".join(
        f"With {recipe_name(recipe)}:\n\n{_ablation_table(groups)}"
        for recipe, groups in ablation_groups(lines).items()
    )


def _ablation_table(groups: Groups) -> str:
    """Validation loss with its spread over seeds, beside the report's perplexities."""
    base = {run["seed"]: run["validation_loss"] for run in groups.get("3:1", [])}
    firsts = [run["first_reading"] for runs in groups.values() for run in runs]
    early = {first[0] for first in firsts if first}
    assert len(early) <= 1, early  # a recipe's points are alike
    rows = []
    for variant, runs in groups.items():
        losses = [run["validation_loss"] for run in runs]
        pairs = [x["validation_loss"] - base[x["seed"]] for x in runs if x["seed"] in base]
        report = REPORT_PERPLEXITIES.get(variant)
        mean = statistics.mean(losses)
        rows.append(
            [
                VARIANT_NAMES.get(variant, variant),
                f"{mean:.4f} ({min(losses):.4f} to {max(losses):.4f})",
                f"{statistics.mean(run['validation_perplexity'] for run in runs):.2f}",
                f"{statistics.mean(pairs):+.4f}" if pairs else "-",
                f"{statistics.mean(run['train_loss'] for run in runs):.2f}",
                *([_first_reading(runs)] if early else []),
                str(len(losses)),
                f"{runs[0]['parameters'] / 1e6:.2f}",
                "-" if report is None else f"{report[0]:.2f}, {report[1]:.2f}",
            ]
        )
    head = (
        "variant",
        "validation loss, nats (range)",
        "perplexity",
        "loss over 3:1, same seeds",
        "last batch's loss",
        *(f"validation loss after {tokens / 1e6:.1f}M, none read twice" for tokens in early),
        "seeds",
        "million parameters",
        "report: training, validation perplexity",
    )
    return markdown(head, rows)


def _first_reading(runs: Sequence[Line]) -> str:
    """Mean and range of the validation losses before any text was read a second time."""
    losses = [run["first_reading"][1] for run in runs if run["first_reading"]]
    if not losses:
        return "-"
    return f"{statistics.mean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})"


def needle_groups(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Cells by how the models were trained, in words, which the line before them says."""
    groups: dict[str, list[Line]] = {}
    recipe = ""
    for line in lines:
        if line["event"] == "environment":
            recipe = _needle_recipe(line.get("settings", {}))
        elif line["event"] == "cell" and "error" not in line:
            groups.setdefault(recipe, []).append(line)
    return groups


def _needle_recipe(settings: Mapping[str, Any]) -> str:
    defaults = {"pairs": 32, "repeats": 1, "steps": 0, "learning_rate": 0.0, "embedding_scale": 1.0}
    x = {**defaults, **settings}
    times = "once" if x["repeats"] == 1 else f"{x['repeats']} times"
    return (
        f"{x['pairs']} pairs, each asked for {times} in a row, {x['steps']:,} steps at a rate of "
        f"{x['learning_rate']:g}, embeddings of {0.02 * x['embedding_scale']:g} at first"
    )


def needle_cells(cells: Sequence[Line]) -> dict[str, dict[tuple[int, float], float]]:
    """Accuracy by length and depth, the mean over seeds, of each pattern."""
    found: dict[str, dict[tuple[int, float], dict[int, float]]] = {}
    for cell in cells:
        place = (cell["length"], cell["depth"])
        found.setdefault(cell["model"], {}).setdefault(place, {})[cell["seed"]] = cell["accuracy"]
    return {
        model: {place: statistics.mean(seeds.values()) for place, seeds in places.items()}
        for model, places in found.items()
    }


def needle_table(lines: Sequence[Line]) -> str:
    """A table for each way of training."""
    return "\n\n".join(
        f"{recipe[:1].upper()}{recipe[1:]}:\n\n{_needle_table(cells)}"
        for recipe, cells in needle_groups(lines).items()
    )


def _needle_table(cells: Sequence[Line]) -> str:
    """Accuracy of each pattern by length and seed, and the worst depth's."""
    lengths = sorted({cell["length"] for cell in cells})
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        found = [cell for cell in cells if cell["model"] == model]
        texts = [_by_seed([cell for cell in found if cell["length"] == n]) for n in lengths]
        seeds = sorted({cell["seed"] for cell in found})
        rows.append([PATTERN_NAMES[model], *texts, ", ".join(str(seed) for seed in seeds)])
    head = ["accuracy, % (worst depth)", *(f"{length:,} tokens" for length in lengths), "seed"]
    return markdown(head, rows)


def _by_seed(cells: Sequence[Line]) -> str:
    """Each seed's mean over depths, and the worst depth of any seed."""
    seeds: dict[int, dict[float, float]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        seeds.setdefault(cell["seed"], {})[cell["depth"]] = cell["accuracy"]
    if not seeds:
        return "-"
    means = ", ".join(f"{100 * statistics.mean(depths.values()):.0f}" for depths in seeds.values())
    worst = min(min(depths.values()) for depths in seeds.values())
    return f"{means} ({100 * worst:.0f})"


TABLES: Mapping[str, Callable[[Sequence[Line]], str]] = {
    "synthetic": synthetic_table,
    "decays": decays_table,
    "ablation": ablation_table,
    "needle": needle_table,
    "decoding": decoding_table,
    "kernels": kernels_table,
}


def provenance(lines: Sequence[Line]) -> str:
    """Where it was measured, a sentence: of all runs in the file."""

    def values(key: str) -> str:
        found: list[Any] = [x.get(key) for x in lines if x["event"] == "environment"]
        return ", ".join(dict.fromkeys(str(value) for value in found if value)) or "none"

    gpu = values("gpu")
    return (
        f"Measured on {'a CPU' if gpu == 'none' else gpu}, torch {values('torch')}, "
        f"fla-core {values('fla-core')}, commit {values('commit')}."
    )
