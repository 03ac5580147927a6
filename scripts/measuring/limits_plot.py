"""How near each figure of `benchmark.py` is to what the device allows."""

from collections.abc import Sequence
from pathlib import Path

from measuring.plot import LIMIT_COLOUR, short_number, styles_of
from measuring.report import Line, name_of

# What is drawn, in this order: title, and by which field a line's label tells its size.
GROUPS = {
    "generate": ("generate(), short prompts", "batch", "row"),
    "decode": ("generate(), one row behind a context", "context", "token"),
    "step": ("a call of several tokens", "tokens", "token"),
    "prefill": ("reading a prompt", "context", "token"),
    "first-token": ("to the first token, in pieces", "context", "token"),
    "train": ("a training step", "tokens", "token"),
}
PLAIN = "16 bits"
BAR, MARGIN = 0.24, 1.3  # inches
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def plot_limits(lines: Sequence[Line], path: Path) -> None:
    """Draw a bar for each case of this package, the newest line of each, and write a PNG.

    Args:
        lines: Of one or more runs of `benchmark.py`, later ones behind earlier ones.
        path: The file to write.

    Raises:
        ValueError: If no line has a limit.
    """
    cases = newest(lines)
    if not cases:
        raise ValueError(
            f"--plot-limits {path} is not allowed with these lines: none of this package says "
            "how near it is to its limit"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(line["measure"] for line in cases))
    figure = Figure(
        figsize=(7.6, MARGIN + BAR * (len(cases) + 2 * len(titles))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    styles = styles_of(cases)
    sizes = [sum(line["measure"] == title for line in cases) + 0.6 for title in titles]
    panels = figure.subplots(
        len(titles), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": sizes}
    )
    for axes, title in zip(panels[:, 0], titles, strict=True):
        own = [line for line in cases if line["measure"] == title]
        shares = [100 * line["fraction_of_limit"] for line in own]
        places = range(len(own), 0, -1)
        colours = [styles[name_of(line)][0] for line in own]
        axes.barh(places, shares, color=colours, height=0.72)
        for place, share, line in zip(places, shares, own, strict=True):
            axes.text(share + 1, place, figure_of(line), va="center", fontsize=8, bbox=PAPER)
        axes.set_yticks(places, [label_of(line) for line in own], fontsize=8)
        axes.set_ylim(0.4, len(own) + 0.6)
        presets = ", ".join(dict.fromkeys(line["preset"] for line in own))
        axes.set_title(f"{GROUPS[title][0]}: {presets}", fontsize=9, loc="left")
        axes.axvline(100, color=LIMIT_COLOUR, ls="--", lw=1)
        axes.grid(alpha=0.25, axis="x")
        axes.set_xlim(0, 118)
    panels[-1, 0].set_xlabel("of the limit: the device's bytes or operations, %")
    figure.savefig(path, dpi=110)


def newest(lines: Sequence[Line]) -> list[Line]:
    """The last line of each case, by group, form and size."""
    found: dict[tuple[int, int, int], Line] = {}
    forms = list(dict.fromkeys(line.get("quantize") for line in lines))
    for line in lines:
        if line.get("model") != "ours" or "fraction_of_limit" not in line:
            continue
        place = list(GROUPS).index(line["measure"])
        form = forms.index(line.get("quantize"))
        found[place, form, line[GROUPS[line["measure"]][1]]] = line
    return [found[case] for case in sorted(found)]


def label_of(line: Line) -> str:
    """How weights are held, and of how many tokens or rows it is."""
    _, key, unit = GROUPS[line["measure"]]
    size = line[key]
    return f"{line.get('quantize', PLAIN)}, {short_number(size)} {unit}{'s' * (size > 1)}"


def figure_of(line: Line) -> str:
    """Milliseconds where one row waits for them, else tokens a second."""
    if line["measure"] == "step":
        return f"{line['ms']:#.3g} ms"
    if line["measure"] in ("generate", "decode") and line.get("batch", 1) == 1:
        return f"{line['ms_per_token']:#.3g} ms a token"
    return f"{line['tokens_per_second']:,.0f} tokens/s"
