"""The figures of docs/experiments.md, from the lines of the experiments."""

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring.plot import number_upwards, set_ticks
from measuring.report import Line

from experiments.tables import (
    DECAY_NAMES,
    MODEL_NAMES,
    PATTERN_NAMES,
    VARIANT_NAMES,
    ablation_groups,
    best_runs,
    events,
    needle_cells,
    needle_groups,
    recipe_name,
)

# Colour and marker of a model, a pattern, an operator.
STYLES = {
    "kda": ("#2f5d9b", "o"),
    "kimi": ("#2f5d9b", "o"),
    "gdn": ("#3f8f5b", "^"),
    "dplr": ("#c0562f", "s"),
    "mamba2": ("#d08a2e", "x"),
    "mla": ("#7a5195", "s"),
    "kda-safe": ("#8fb0dd", "o"),
    "dplr-safe": ("#e3a68f", "s"),
    "package": ("#777777", "."),
    "kda-even": ("#7fb3d5", "o"),
    "kda-slow": ("#8e44ad", "o"),
    "kda-full": ("#444444", "o"),
    "gdn-slow": ("#a3c644", "^"),
    "gdn-spread": ("#c0562f", "^"),
}
COLOURS = 64  # of a small PNG
CURVE_LENGTH = 1024  # of figure 4's lower row
DECODING_NAMES = {"kimi": "Kimi Linear", "mla": "MLA in every layer"}
FADED = 0.6  # packed weights, of what is drawn before them
OPERATOR_NAMES = {
    "kda": "KDA",
    "dplr": "DPLR",
    "kda-safe": "KDA, bounded decays",
    "dplr-safe": "DPLR, bounded decays",
    "package": "KDA as layers call it",
}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, always [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_synthetic(lines: Sequence[Line], path: Path) -> None:
    """As figure 4: peak accuracy over length above, accuracy over steps at one length below: 1,024
    tokens, or as many as there are. A point and a curve for each seed; the line is their mean."""
    runs = best_runs(lines)
    tasks = list(dict.fromkeys(task for task, _, _ in runs))
    lengths = sorted({length for _, length, _ in runs})
    figure, panels = new_figure(2, len(tasks), 3.4, 2.8)
    for (above, below), task in zip(panels.T, tasks, strict=True):
        measured = {length for name, length, _ in runs if name == task}
        shown = CURVE_LENGTH if CURVE_LENGTH in measured else max(measured)
        for model in MODEL_NAMES:
            found = {n: x for (t, n, m), x in runs.items() if (t, m) == (task, model)}
            if not found:
                continue
            colour, marker = STYLES[model]
            peaks = [(n, 100 * run["best_accuracy"]) for n, x in found.items() for run in x]
            above.plot(*zip(*peaks, strict=True), marker, color=colour, ms=4, alpha=0.7)
            means = [
                (n, statistics.mean(share for length, share in peaks if length == n))
                for n in sorted(found)
            ]
            above.plot(*zip(*means, strict=True), color=colour, label=MODEL_NAMES[model])
            for run in found.get(shown, []):
                curve = [(0, 0.0), *_curve(lines, run)]
                below.plot(*zip(*curve, strict=True), color=colour, lw=1.2)
        above.set_xscale("log", base=2)
        set_ticks(above, lengths)
        above.set(title=task, xlabel="tokens", ylim=(-3, 103))
        below.set(xlabel=f"steps, {shown} tokens", ylim=(-3, 103))
        for axes in (above, below):
            axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("best accuracy (%)")
    panels[1][0].set_ylabel("accuracy (%)")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _curve(lines: Sequence[Line], run: Line) -> list[tuple[int, float]]:
    """Points of a run: step and accuracy in percent."""
    keys = ("task", "length", "seed", "model", "learning_rate")
    points = {
        point["step"]: 100 * point["accuracy"]
        for point in events(lines, "point")
        if all(point[key] == run[key] for key in keys) and point["step"] <= run["steps"]
    }
    return sorted(points.items())


def plot_decays(lines: Sequence[Line], path: Path) -> None:
    """Wrong answers over steps, a panel for each task and length, a line for each seed."""
    runs = best_runs(lines)
    places = list(dict.fromkeys((task, length) for task, length, _ in runs))
    figure, (panels,) = new_figure(1, len(places), 4.4, 3.6)
    for axes, (task, length) in zip(panels, places, strict=True):
        for model, name in DECAY_NAMES.items():
            for i, run in enumerate(runs.get((task, length, model), [])):
                curve = [(step, 100 - share) for step, share in _curve(lines, run)]
                style = {"color": STYLES[model][0], "lw": 1.2, "label": None if i else name}
                axes.plot(*zip(*curve, strict=True), **style)
        axes.set_yscale("log")
        axes.set(title=f"{task}, {length} tokens", xlabel="steps")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("wrong answers (%)")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _kind(line: Line) -> tuple[str, str]:
    return line["model"], line.get("quantize", "")


def _decoding_kinds(lines: Sequence[Line]) -> dict[tuple[str, str], float]:
    """Models and how their weights are held, each with how strongly it is drawn."""
    found = dict.fromkeys(_kind(line) for line in events(lines, "decode"))
    kinds: dict[tuple[str, str], float] = {}
    for model in DECODING_NAMES:
        forms = [form for name, form in found if name == model]
        kinds |= {(model, form): FADED**i for i, form in enumerate(forms)}
    return kinds


def plot_decoding(lines: Sequence[Line], path: Path) -> None:
    """Time per token of one row and of as many as fit, and the cache, over the context."""
    figure, ((time, batch, cache),) = new_figure(1, 3, 3.8, 3.2)
    for (model, form), alpha in _decoding_kinds(lines).items():
        found = [x for x in events(lines, "decode") if _kind(x) == (model, form)]
        colour, marker = STYLES[model]
        name = ", ".join(filter(None, (DECODING_NAMES[model], form)))
        style = {"color": colour, "marker": marker, "ms": 4, "alpha": alpha, "label": name}
        one = sorted((x for x in found if x["rows"] == 1), key=lambda x: x["context"])
        most: dict[int, Line] = {}
        for line in sorted(found, key=lambda x: (x["context"], x["rows"])):
            most[line["context"]] = line
        if not one:
            continue
        contexts = [x["context"] for x in one]
        time.plot(contexts, [x["ms_per_token"] for x in one], **style)
        time.plot(contexts, [x["limit_ms"] for x in one], "--", color=colour, alpha=alpha, lw=1)
        batch.plot(list(most), [x["ms_per_token"] for x in most.values()], **style)
        cache.plot(contexts, [x["cache_bytes_needed"] / 1e9 for x in one], **style)
    for axes, title, unit in (
        (time, "one row; dashed: byte limit", "ms per token"),
        (batch, "as many rows as fit", "ms per token of all rows"),
        (cache, "cache of a row", "GB"),
    ):
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="tokens in the cache", ylabel=unit)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        set_ticks(axes, sorted({x["context"] for x in events(lines, "decode")}))
    for axes in (batch, cache):
        axes.set_yscale("log")
        number_upwards(axes)
    time.set_ylim(bottom=0)
    time.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_kernels(lines: Sequence[Line], path: Path) -> None:
    """As figure 2, forward and with the backward pass."""
    figure, (panels,) = new_figure(1, 2, 4.2, 3.2)
    for axes, kind in zip(panels, ("forward", "forward+backward"), strict=True):
        for name, title in OPERATOR_NAMES.items():
            times = {
                line["length"]: line["ms"]
                for line in events(lines, "kernel")
                if (line["operator"], line["pass"]) == (name, kind)
            }
            if times:
                colour, marker = STYLES[name]
                points = sorted(times.items())
                axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        number_upwards(axes)
        set_ticks(axes, sorted({x["length"] for x in events(lines, "kernel")}))
        axes.set(title=kind, xlabel="tokens", ylabel="ms")
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_ablation(lines: Sequence[Line], path: Path) -> None:
    """Validation loss of every variant, a point per seed, a panel for each recipe."""
    recipes = ablation_groups(lines)
    rows = max(len(groups) for groups in recipes.values())
    figure, (panels,) = new_figure(1, len(recipes), 5.2, 0.8 + 0.36 * rows)
    for axes, (recipe, groups) in zip(panels, recipes.items(), strict=True):
        names = [VARIANT_NAMES.get(variant, variant) for variant in groups]
        for place, runs in enumerate(groups.values()):
            losses = [run["validation_loss"] for run in runs]
            axes.plot(losses, [place] * len(losses), "o", color="#2f5d9b", alpha=0.6)
            axes.plot([sum(losses) / len(losses)], [place], "|", color="#c0562f", ms=14)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(recipe_name(recipe), fontsize=9)
        axes.set_xlabel("validation loss (nats per token); bar: mean")
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def plot_needle(lines: Sequence[Line], path: Path) -> None:
    """Accuracy by depth and length: a column for each pattern, a row for each way of training."""
    groups = needle_groups(lines)
    figure, panels = new_figure(len(groups), len(PATTERN_NAMES), 3.4, 2.6)
    image = None
    for row, (recipe, lines_of) in zip(panels, groups.items(), strict=True):
        found = needle_cells(lines_of)
        for axes, (model, name) in zip(row, PATTERN_NAMES.items(), strict=True):
            axes.set(title=name, xlabel="tokens")
            cells = found.get(model)
            if cells is None:
                axes.axis("off")
                axes.set_title(f"{name}: not trained")
                continue
            lengths, depths = (sorted({place[i] for place in cells}) for i in (0, 1))
            grid = [[100 * cells.get((n, d), float("nan")) for n in lengths] for d in depths]
            image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        row[0].set_ylabel(f"{recipe.split(' in a row')[0]}\ndepth (%)", fontsize=8)
    figure.colorbar(image, ax=list(panels.flat), label="accuracy (%), mean over seeds")
    figure.savefig(path, dpi=110)


def save_small(figure: Any, path: Path) -> None:
    """A PNG of few colours, which takes a third."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS).save(path, format="PNG", optimize=True)


PLOTS: Mapping[str, Callable[[Sequence[Line], Path], None]] = {
    "synthetic": plot_synthetic,
    "decays": plot_decays,
    "ablation": plot_ablation,
    "needle": plot_needle,
    "decoding": plot_decoding,
    "kernels": plot_kernels,
}
