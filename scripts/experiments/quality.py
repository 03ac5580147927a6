"""What few bits cost, as docs/experiments.md has it: tables and figure of the lines of
experiment_quantization.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring.report import Line

from experiments.plots import new_figure, save_small
from experiments.tables import events, markdown

NUM_PARTS = 5  # that a quantisation tells apart
# label, colour and marker, without and with calibration
KINDS = (("without data", "#c0562f", "o"), ("calibrated", "#2f5d9b", "^"))


def quality_lines(lines: Sequence[Line]) -> dict[tuple[str, bool], Line]:
    """Of the model that was measured last, by form and whether it was calibrated."""
    found = events(lines, "quality")
    return {
        (line["form"], line["is_calibrated"]): line
        for line in found
        if line["model"] == found[-1]["model"]
    }


def form_name(form: str) -> str:
    """A form in words: "every part in 3 bits, groups of 64"."""
    if form == "none":
        return "16 bits"
    if "=" not in form:
        return form
    parts = dict(part.split("=") for part in form.split("+"))
    held = {text: _bits_name(text) for text in parts.values()}
    if len(parts) == NUM_PARTS and len(held) == 1:
        return f"every part in {next(iter(held.values()))}"
    return "; ".join(f"{part.replace('_', ' ')} in {held[text]}" for part, text in parts.items())


def _bits_name(text: str) -> str:
    zeros = " with zeros" if text.endswith("z") else ""
    bits, _, group = text.removesuffix("z").partition("/")
    size = {"": "", "row": ", a scale per row"}.get(group, f", groups of {group}")
    return f"{bits} bits{size}{zeros}"


def quantization_table(lines: Sequence[Line]) -> str:
    """Tables of whole models, of single parts, and of the experts' groups."""
    found = quality_lines(lines)
    base = found.get(("none", False))
    forms = list(dict.fromkeys(form for form, _ in found if form != "none"))
    whole = [form for form in forms if "=" not in form or form.count("=") == NUM_PARTS]
    parts = [form for form in forms if form not in whole and form.endswith(("=3/64", "=4/64"))]
    groups = [form for form in forms if form not in whole and form.startswith("experts=")]
    tables = [
        _quality_table("held", whole, found, base),
        _quality_table("one part", parts, found, base),
        _quality_table("experts alone", groups, found, base),
    ]
    trained = events(lines, "trained")
    if trained and base is not None:
        last = trained[-1]
        tables.insert(
            0,
            f"{last['parameters'] / 1e9:.2f}B parameters, {last['tokens'] / 1e6:,.0f}M tokens in "
            f"{last['train_seconds'] / 60:.0f} minutes; {base['bits_per_byte']:.4f} bits a byte in "
            f"16 bits, on {base['eval_tokens']:,} tokens.",
        )
    return "\n\n".join(table for table in tables if table)


def _quality_table(
    title: str,
    forms: Sequence[str],
    found: Mapping[tuple[str, bool], Line],
    base: Line | None,
) -> str:
    """A row for each form; figures without and with calibration."""
    rows = []
    for form in forms:
        pair = [found.get((form, is_calibrated)) for is_calibrated in (False, True)]
        line = pair[0] or pair[1]
        assert line is not None
        rows.append(
            [
                form_name(form),
                f"{line['held_bytes'] / 1e9:.2f}",
                f"{line['held_bytes_48b'] / 1e9:.1f}",
                _both(pair, lambda x: _percent_over(base, x), "{:+.2f}") if base else "-",
                _both(pair, lambda x: x["kl"], "{:.2g}"),
                _both(pair, lambda x: 100 * x["agreement"], "{:.1f}"),
            ]
        )
    head = (
        title,
        "GB",
        "the 48B model, GB",
        "bits a byte over 16 bits, %: without data, calibrated",
        "KL, nats a token",
        "same likeliest token, %",
    )
    return markdown(head, rows) if rows else ""


def _both(pair: Sequence[Line | None], figure: Callable[[Line], float], form: str) -> str:
    """ "a, b", or one of them if the other was not measured for any scheme."""
    texts = ["-" if line is None else form.format(figure(line)) for line in pair]
    return texts[0] if pair[1] is None else ", ".join(texts)


def plot_quantization(lines: Sequence[Line], path: Path) -> None:
    """KL divergence from the 16-bit model and bits per byte against its own, over gigabytes, of
    models that are packed as a whole. Labels are forms and what the 48B model takes in them."""
    found = quality_lines(lines)
    whole = {key: x for key, x in found.items() if _is_whole(key[0])}
    figure, panels = new_figure(2, 1, 7.0, 3.0)
    above, below = panels[:, 0]
    _draw(above, whole, lambda x: x["kl"])
    for line in {x["form"]: x for x in whole.values()}.values():
        title = line["form"].partition("+")[0].replace("experts=", "all ")
        is_left = "=" in line["form"]  # presets are near them
        above.annotate(
            f"{title}: {line['held_bytes_48b'] / 1e9:.0f} GB",
            (line["held_bytes"] / 1e9, line["kl"]),
            xytext=(-6 if is_left else 6, -3),
            textcoords="offset points",
            ha="right" if is_left else "left",
            fontsize=7,
        )
    above.set_yscale("log")
    above.set(ylabel="KL, nats a token")
    above.legend(fontsize=8)
    if base := found.get(("none", False)):
        _draw(below, whole, lambda x: _percent_over(base, x))
        below.axhline(0, color="black", linewidth=0.8)
    below.set(ylabel="bits a byte over 16 bits, %", xlabel="GB; labels: of the 48B model")
    for axes in panels[:, 0]:
        axes.margins(x=0.2, y=0.1)
        axes.grid(alpha=0.25)
    save_small(figure, path)


def _draw(
    axes: Any, found: Mapping[tuple[str, bool], Line], figure: Callable[[Line], float]
) -> None:
    """A point for each form, by whether it was calibrated."""
    for is_calibrated, (label, colour, marker) in enumerate(KINDS):
        lines = [line for (_, is_so), line in found.items() if is_so == bool(is_calibrated)]
        points = sorted((line["held_bytes"] / 1e9, figure(line)) for line in lines)
        if points:
            style = {"marker": marker, "color": colour, "label": label}
            axes.plot(*zip(*points, strict=True), linestyle="none", **style)


def _is_whole(form: str) -> bool:
    """Whether a form packs more than one part."""
    return form != "none" and ("=" not in form or form.count("=") == NUM_PARTS)


def _percent_over(base: Line, line: Line) -> float:
    """By how much a form takes more bits for a byte of text."""
    return 100 * (line["bits_per_byte"] / base["bits_per_byte"] - 1)
