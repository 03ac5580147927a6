"""What the documentation names is there: files, links, headings, and what its code imports."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# A path in backquotes that begins with one of the repository's folders.
FOLDERS = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_are_there(page: Path) -> None:
    text = page.read_text()
    if page.name != "CHANGELOG.md":  # which tells of what is gone
        for name in NAMED.findall(text):
            assert (ROOT / name).exists(), name
    for link in LINK.findall(text):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_compiles_and_its_imports_are_there(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("kimi_linear"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_readme_leads_to_every_page() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= linked


def milliseconds(line: dict) -> str:
    return f"{line['ms_per_token']:.3g}"


def rate(line: dict) -> str:
    return f"{line['tokens_per_second']:,.0f}"


def rounded_rate(line: dict) -> str:
    return f"{round(line.get('tok_s') or line['tokens_per_second'], -2):,}"


def step(line: dict) -> str:
    return f"{line['ms']:.0f} ms, {line['peak_bytes_above_weights'] / 1e9:.1f} GB"


def failure(line: dict) -> str:
    return "out of memory" if line["error"].startswith("OutOfMemoryError") else line["error"]


# A row of the README's table: its first cell, then for every figure the file, the fields of the
# line that it comes from, and how it is written.
FIGURES = {
    "training step": [
        ("training_step_h200", {"model": "native"}, step),
        ("training_step_h200", {"model": "ours"}, step),
    ],
    "`generate()`": [
        ("generate_h200", {"model": "native", "batch": 1}, milliseconds),
        ("native_h200", {"generate_static": 1}, lambda line: f"{1000 / line['tok_s']:.1f}"),
        ("generate_h200", {"model": "ours", "batch": 1}, milliseconds),
    ],
    "8 / 32 / 128 rows": [
        ("generate_h200", {"model": "native", "batch": 8}, rate),
        ("generate_rows_h200", {"model": "native", "batch": 32}, rate),
        ("generate_rows_h200", {"model": "native", "batch": 128}, rate),
        ("generate_h200", {"model": "ours", "batch": 8}, rate),
        ("generate_rows_h200", {"model": "ours", "batch": 32}, rate),
        ("generate_rows_h200", {"model": "ours", "batch": 128}, rate),
    ],
    "behind 131,072": [
        ("native_h200", {"decode_at": 131072}, lambda line: f"{line['tpot_ms']:.0f}"),
        ("native_h200", {"decode_at": 1048576}, failure),
        ("long_contexts_h200", {"context": 131072, "rows": 1}, milliseconds),
        ("long_contexts_h200", {"context": 1048576, "rows": 1}, milliseconds),
    ],
    "reading 4,096": [
        ("native_h200", {"prefill": 4096}, rounded_rate),
        ("native_h200", {"prefill": 131072}, rounded_rate),
        ("prefill_h200", {"name": "new", "tokens": 4096}, rounded_rate),
        ("prefill_h200", {"name": "new", "tokens": 131072}, rounded_rate),
    ],
    "CPU: KDA": [
        ("kda_cpu", {"case": "native_forward"}, lambda line: f"{line['seconds']:.1f} s"),
        ("kda_cpu", {"case": "ours_forward"}, lambda line: f"{line['seconds']:.3f} s"),
    ],
    "CPU: MLA": [
        ("mla_decode_cpu", {"case": "native", "context": 16384}, lambda x: f"{x['seconds']:.1f}"),
        ("mla_decode_cpu", {"case": "ours", "context": 16384}, lambda x: f"{x['seconds']:.3f}"),
    ],
}


@pytest.mark.parametrize("row", FIGURES)
def test_figures_of_the_readme_are_recorded(row: str) -> None:
    text = (ROOT / "README.md").read_text()
    cells = next(line for line in text.splitlines() if line.startswith(f"| {row}"))
    for name, fields, write in FIGURES[row]:
        file = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        written = {write(line) for line in lines if fields.items() <= line.items()}
        assert any(figure in cells for figure in written), (name, fields, written)


FOLDERS_OF_ENGINES = {
    "small-bf16": "16 bits",
    "small-w4": "4 bits",
    "small-w4-head": "4 bits and a packed head",
    "small-exl3-4.0": "EXL3 at 4 bits",
}
NAMES_OF_ENGINES = {
    "vllm": "vLLM",
    "ours-bfloat16": "this package in bfloat16",
    "exllamav3": "exLlamaV3 in float16",
}


@pytest.mark.parametrize(("name", "count"), [("engines", 6), ("engines_exllamav3", 5)])
def test_figures_of_other_engines_are_recorded(name: str, count: int) -> None:
    text = (ROOT / "docs" / "engines.md").read_text()
    file = ROOT / "benchmarks" / "results" / f"{name}_h200.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    runs = [line for line in lines if line["case"] == "engine"]
    assert len(runs) == count
    for run in runs:
        cells = [
            f"{FOLDERS_OF_ENGINES[run['folder']]}, {NAMES_OF_ENGINES[run['engine']]}",
            f"{run['median_difference']:.4f}",
            f"{run['mean_difference']:.4f}",
            f"{run['rms_difference']:.3f}",
            f"{run['max_difference']:.2f}",
            str(sum(run["equal_tokens"])),
        ]
        assert f"| {' | '.join(cells)} |" in text, cells
    widest = max(gap for run in runs for gap in run["gaps_where_they_part"])
    assert f"up to {widest:.3f} nats" in text.replace("\n", " ")
