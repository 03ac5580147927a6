"""Put the experiments' results into docs/experiments.md: tables and figures from the JSON lines.

    python scripts/experiment_report.py

Between the lines `<!-- results: NAME -->` and `<!-- end: NAME -->` the page holds what this command
writes there: table, figure, and where it was measured, or that there are no results yet. The rest
is left as it is. Results are read from `benchmarks/results/experiment_NAME*.jsonl`, those of
`quantization` from `quantization_quality*.jsonl`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from experiments import plots, tables
from experiments.quality import plot_quantization, quantization_table
from experiments.runs import read_experiment
from experiments.tables import events, provenance
from measuring.report import Line
from options.settings import command_parser, run_main

ROOT = Path(__file__).parent.parent
TABLES = {**tables.TABLES, "quantization": quantization_table}
PLOTS = {**plots.PLOTS, "quantization": plot_quantization}
# The kind of line without which there is nothing to show.
NEEDED = {"synthetic": "run", "decays": "run", "ablation": "run", "needle": "cell"}
NEEDED |= {"decoding": "decode", "kernels": "kernel", "quantization": "quality"}
FILES = {"quantization": "quantization_quality"}
NO_RESULTS = "No results yet."


def section(name: str, lines: Sequence[Line], image: str) -> str:
    """What stands between the marks of one experiment.

    Args:
        name: A key of `TABLES`.
        lines: Of it; perhaps none.
        image: The figure's place, as the page names it.
    """
    if not events(lines, NEEDED[name]):
        return NO_RESULTS
    return f"{TABLES[name](lines)}\n\n![{name}]({image})\n\n{provenance(lines)}"


def replace_section(page: str, name: str, text: str) -> str:
    """The page with another text between the marks.

    Raises:
        ValueError: If the page has no such marks.
    """
    begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"--page is not allowed: it must have {begin} and {end} once")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def main(
    *,
    page: str | os.PathLike[str] = ROOT / "docs" / "experiments.md",
    results: str | os.PathLike[str] = ROOT / "benchmarks" / "results",
) -> dict[str, bool]:
    """Write tables and figures.

    Args:
        page: The Markdown file; figures go beside it.
        results: Folder of the JSON lines.

    Returns:
        By experiment, whether there are results.

    Raises:
        ValueError: If the page lacks marks, or one of the two is not there.
    """
    path, folder = Path(page), Path(results)
    if not path.is_file():
        raise ValueError(f"--page {str(page)!r} is not allowed: it must be a Markdown file")
    if not folder.is_dir():
        raise ValueError(f"--results {str(results)!r} is not allowed: it must be a folder")
    text, found = path.read_text(encoding="utf-8"), {}
    for name, plot in PLOTS.items():
        files = FILES.get(name, f"experiment_{name}")
        lines = read_experiment(sorted(folder.glob(f"{files}*.jsonl")), name)
        image = f"experiment_{name}.png"
        text = replace_section(text, name, section(name, lines, image))
        found[name] = bool(events(lines, NEEDED[name]))
        if found[name]:
            plot(lines, path.with_name(image))
    path.write_text(text, encoding="utf-8")
    for name, has_results in found.items():
        print(f"{name}: {'table and figure' if has_results else NO_RESULTS}")
    return found


if __name__ == "__main__":
    parser = command_parser(__doc__)
    parser.add_argument("--page", default=ROOT / "docs" / "experiments.md", metavar="FILE")
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", metavar="DIR")
    run_main(main, parser)
