"""The figure of `benchmark.py`: speed and memory over context and batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.report import Line, name_of

# Colour, marker and name in the legend.
STYLES = {
    "ours": ("#2f5d9b", "o", "this package"),
    "native": ("#c0562f", "s", "Transformers' own"),
}
# Colours and markers of this package with other weights, in the order in which they come.
FORM_STYLES = (("#3f8f5b", "^"), ("#d08a2e", "v"), ("#7a5195", "D"), ("#444444", "P"))
Styles = dict[str, tuple[str, str, str]]
LIMIT_COLOUR = "#777777"
# Highest over lowest value beyond which only powers of ten are numbered.
WIDE_RANGE = 3000
# Measure, what it is drawn over, title, name of the horizontal axis.
COLUMNS = (
    ("prefill", "context", "prefill, one row", "tokens read"),
    ("decode", "context", "generate(), one row", "tokens in the cache"),
    ("generate", "batch", "generate(), short prompts", "rows"),
)


def plot_lines(lines: Sequence[Line], path: Path) -> None:
    """Draw what the lines hold and write a PNG.

    Args:
        lines: Of one or more runs of `benchmark.py`.
        path: The file to write.

    Raises:
        ValueError: If there is nothing to draw.
    """
    columns = [column for column in COLUMNS if _points(lines, column[0], column[1])]
    if not columns:
        measured = sorted({line["measure"] for line in lines})
        raise ValueError(
            f"--plot {path} is not allowed with the lines of {measured}: one of prefill, decode, "
            "generate must have been measured"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_narrow = len(columns) == 1  # the legend then needs a line per entry
    width = 0.8 + (5.2 if is_narrow else 3.9 * len(columns))
    figure = Figure(figsize=(width, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(columns), squeeze=False, sharex="col")
    styles = styles_of(lines)
    largest = max(line.get("peak_bytes_above_weights") or 0 for line in lines)
    unit, unit_name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    for i, (measure, key, title, label) in enumerate(columns):
        points = _points(lines, measure, key)
        speed, memory = panels[0][i], panels[1][i]
        _draw(speed, points, styles, key, "tokens_per_second", 1)
        _draw(memory, points, styles, key, "peak_bytes_above_weights", unit)
        _mark_failures(speed, lines, styles, measure, key)
        speed.set_title(title, fontsize=10)
        memory.set_xlabel(label)
        set_ticks(memory, sorted({line[key] for line in lines if line["measure"] == measure}))
    panels[0][0].set_ylabel("tokens per second")
    panels[1][0].set_ylabel(f"memory above the weights ({unit_name})")
    figure.suptitle(_title(lines), fontsize=11)
    handles = {}
    for axes in panels.flat:
        handles.update({name: h for h, name in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=1 if is_narrow else 5,
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def _points(lines: Sequence[Line], measure: str, key: str) -> dict[str, list[Line]]:
    """Lines with figures by model, in rising order."""
    found: dict[str, list[Line]] = {}
    for line in sorted((x for x in lines if x["measure"] == measure), key=lambda x: x[key]):
        if "error" not in line:
            found.setdefault(name_of(line), []).append(line)
    return found


def styles_of(lines: Sequence[Line]) -> Styles:
    """Of each model, and of each way to hold weights."""
    others = iter(FORM_STYLES * len(lines))
    styles = dict(STYLES)
    for line in lines:
        if "model" in line and name_of(line) not in styles:
            styles[name_of(line)] = (*next(others), f"this package, {line['quantize']}")
    return styles


def _draw(
    axes: Any,
    points: dict[str, list[Line]],
    styles: Styles,
    key: str,
    field: str,
    unit: float,
) -> None:
    """One line per model, and the limit, dashed: without packed weights if there are such."""
    limits: dict[int, float] = {}
    for kind, lines in points.items():
        colour, marker, name = styles[kind]
        known = [(line[key], line[field] / unit) for line in lines if line[field]]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=marker, ms=4, label=name)
        for line in lines:
            is_speed = field == "tokens_per_second"
            limit = line["limit"][field] if is_speed else line["needed_bytes_above_weights"]
            if "quantize" not in line or line[key] not in limits:
                limits[line[key]] = limit / unit
    name = "limit (speed: of the device; memory: the cache)"
    ordered = sorted(limits.items())
    marker = "" if len(ordered) > 1 else "_"
    axes.plot(
        *zip(*ordered, strict=True), "--", color=LIMIT_COLOUR, lw=1.2, marker=marker, label=name
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    number_upwards(axes)
    axes.grid(alpha=0.25, which="major")


def number_upwards(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten, or at the powers if there are many."""
    from matplotlib.ticker import LogLocator, NullFormatter

    lowest, highest = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if highest / lowest < WIDE_RANGE else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_failures(
    axes: Any, lines: Sequence[Line], styles: Styles, measure: str, key: str
) -> None:
    """A cross at the bottom where a model failed; what was not run is left out."""
    for kind, (colour, _, name) in styles.items():
        failed = [
            line[key]
            for line in lines
            if line["measure"] == measure
            and name_of(line) == kind
            and "error" in line
            and not line["error"].startswith("not ")
        ]
        if failed:
            lowest, highest = axes.get_ylim()  # with room for the cross below what was measured
            axes.set_ylim(lowest * (lowest / highest) ** 0.1, highest)
            axes.plot(
                failed,
                [0.04] * len(failed),
                "x",
                color=colour,
                transform=axes.get_xaxis_transform(),
                label=f"{name}: failed",
            )


def set_ticks(axes: Any, values: Sequence[int]) -> None:
    """The measured places only, so that every label is one; thinned where they would touch."""
    apart = [values[-1]]
    widest = max(2.0, (values[-1] / values[0]) ** 0.13)
    for value in reversed(values[:-1]):
        if apart[-1] / value >= widest:
            apart.append(value)
    axes.set_xticks(apart, [short_number(value) for value in apart])
    axes.minorticks_off()
    if len(values) == 1:
        axes.set_xlim(values[0] / 2, values[0] * 2)


def short_number(value: int) -> str:
    """4096 as "4k"."""
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{suffix}"
    return str(value)


def _title(lines: Sequence[Line]) -> str:
    """Size, device and dtype."""
    first = next((line for line in lines if line["measure"] == "environment"), {})
    drawn = {column[0] for column in COLUMNS}
    presets = sorted({line["preset"] for line in lines if line["measure"] in drawn})
    device = first.get("gpu") or f"CPU, threads: {first.get('threads', '?')}"
    return f"Kimi Linear {', '.join(presets)}, random weights, {first.get('dtype', '')}, {device}"
