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
