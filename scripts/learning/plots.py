"""The demo's figure: loss and bits per byte over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

LOSS_COLOUR, BITS_COLOUR = "#4a6fa5", "#b5442e"
# Colours and dashes of the lines to beat, in the order in which they come.
LINE_STYLES = (("#777777", "--"), ("#444444", "-."), ("#999999", ":"))


def plot_training(
    path: Path,
    losses: Sequence[tuple[int, float]],
    points: Sequence[tuple[int, float]],
    final_bits: float,
    lines: Mapping[str, float],
    title: str,
) -> None:
    """Draw two panels side by side and write them as a PNG.

    Args:
        path: The file to write.
        losses: (step, training loss in nats per token).
        points: (step, bits per byte on a sample of the held-out text).
        final_bits: Bits per byte on all held-out text, drawn at the last step.
        lines: Bits per byte to beat, by name.
        title: Stands above both.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not losses or not points:
        raise ValueError(f"losses and points have {len(losses)} and {len(points)} entries: need 1")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10)
    left.plot(*zip(*losses, strict=True), color=LOSS_COLOUR, linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.plot(
        *zip(*points, strict=True),
        "o-",
        color=BITS_COLOUR,
        markersize=3,
        label="sample, on the way",
    )
    last_step = points[-1][0]
    right.plot(
        [last_step], [final_bits], "D", color=BITS_COLOUR, label=f"all held out: {final_bits:.3f}"
    )
    for i, (name, value) in enumerate(lines.items()):
        colour, dashes = LINE_STYLES[i % len(LINE_STYLES)]
        right.axhline(
            value, color=colour, linestyle=dashes, linewidth=1, label=f"{name}: {value:.3f}"
        )
    right.set(xlabel="step", ylabel="held-out bits per byte")
    right.set_ylim(0.9 * min(final_bits, *lines.values(), points[-1][1]), 3.2)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


CURVE_COLOURS = (LOSS_COLOUR, BITS_COLOUR, "#777777", "#444444")
# Fewer points than this are marked.
FEW_POINTS = 40
# Panels of a fine-tuning's figure, each with the logged values that it shows if they are there.
PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    "token accuracy": ("mean_token_accuracy", "eval_mean_token_accuracy"),
    "reward": ("reward", "eval_reward", "rewards/chosen", "rewards/rejected"),
    "reward accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "entropy": ("entropy",),
    "mean length of answers": ("completions/mean_length",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
}


def plot_curves(path: Path, history: Sequence[Mapping[str, float]], title: str) -> None:
    """Draw what a trainer logged, a panel for each kind of value, and write it as a PNG.

    Args:
        path: The file to write; it is replaced in one step.
        history: Trainer's `log_history`: dicts with `step` and values by name.
        title: Stands above all panels.

    Raises:
        ValueError: If none of the values is known.
    """
    curves = {
        panel: {name: found for name in names if (found := _curve(history, name))}
        for panel, names in PANELS.items()
    }
    curves = {panel: lines for panel, lines in curves.items() if lines}
    if not curves:
        raise ValueError(f"history has {len(history)} entries: it needs 1 with a value to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (panel, lines) in zip(grid, curves.items(), strict=False):
        for colour, (name, points) in zip(CURVE_COLOURS, lines.items(), strict=False):
            steps, values = zip(*points, strict=True)
            mark = "." if len(points) < FEW_POINTS else ""
            axes.plot(steps, values, marker=mark, color=colour, linewidth=1, label=name)
        axes.set(xlabel="step", ylabel=panel)
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)


def _curve(history: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(values["step"], values[name]) for values in history if name in values]
