"""What `benchmark.py` says: the environment, JSON lines, and a table of them."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Line = Mapping[str, Any]
PACKAGES = ("torch", "transformers", "triton", "fla-core")
# Figures are kept with so many significant digits: more would be noise.
DIGITS = 5
# Of an error in the table; the JSON line has all of it.
TABLE_WIDTH = 48


class Recorder:
    """Prints each line as JSON when it comes, appends it to a file, and keeps it.

    Args:
        path: The file, made anew; None: no file.
        is_appended: Whether what is in the file stays there.
    """

    def __init__(self, path: Path | None, is_appended: bool = False) -> None:
        self.path = path
        self.lines: list[Line] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_appended:
                path.write_text("")

    def tell(self, line: Line) -> None:
        """Take one more line."""
        line = rounded(line)
        self.lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(text + "\n")


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def environment(
    device: torch.device, command: Sequence[str], commit: str | None = None
) -> dict[str, Any]:
    """Device, versions, commit and command line."""
    is_cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        **{package: _version(package) for package in PACKAGES},
        "commit": commit or current_commit(),
        "command": shlex.join(command),
    }


def read_lines(paths: Sequence[Path]) -> list[Line]:
    """The lines of earlier runs.

    Raises:
        ValueError: If a file holds no figures.
    """
    lines: list[Line] = []
    for path in paths:
        found = [json.loads(text) for text in path.read_text().splitlines() if text.strip()]
        if not any("measure" in line for line in found):
            raise ValueError(f"--plot-from {path} is not allowed: it must hold lines of --output")
        lines += found
    return lines


def table(lines: Sequence[Line]) -> str:
    """One row per figure, the models' one below the other, columns aligned."""
    head = ("measure", "at", "model", "figure", "limit", "of limit", "above weights")
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in (_row(line) for line in lines if "model" in line):
        groups.setdefault(row[:2], []).append(row)
    rows = [head, *(row for group in groups.values() for row in group)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, tuple("-" * width for width in widths))
    texts = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(text.rstrip() for text in texts)


def _row(line: Line) -> tuple[str, ...]:
    places = ("context", "batch", "tokens", "disk_caches")
    at = next((f"{key} {line[key]}" for key in places if key in line), "")
    start = (line["measure"], at.replace("_", " "), name_of(line))
    if "error" in line:
        return (*start, line["error"][:TABLE_WIDTH], "", "", "")
    limit = line.get("limit", {})
    fraction, memory = line.get("fraction_of_limit"), line.get("peak_bytes_above_weights")
    return (
        *start,
        _figure(line),
        _milliseconds(limit["ms"]) if limit else "",
        "" if fraction is None else f"{100 * fraction:.3g} %",
        "" if memory is None else _size(memory),
    )


def name_of(line: Line) -> str:
    """A model, and how its weights are held if that is not as the dtype says."""
    return " ".join(filter(None, (line["model"], line.get("quantize"))))


def _figure(line: Line) -> str:
    if line["measure"] == "first-call":
        return f"{line['first_call_seconds']:.1f} s, then {line['third_call_seconds']:.2f} s"
    if line["measure"] == "memory":
        held = f"{_size(line['held_bytes'])} of weights"
        whole = line.get("process_bytes")
        return held if whole is None else f"{held}, {_size(whole)} in all"
    if line["measure"] == "requests":
        share, late = line["fraction_of_full_batch"], line["late_first_token_seconds"]
        speed = f"{line['tokens_per_second']:,.4g} tokens/s, {100 * share:.3g} % of a full batch"
        return f"{speed}, {late:.2g} s to a late first token"
    speed = f"{line['tokens_per_second']:,.4g} tokens/s"
    if line["tokens_per_second"] >= 1000:
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    if "ms_per_token" in line:
        host = line.get("host_ms_per_token")
        extra = "" if host is None else f" ({_milliseconds(host)} host)"
        return f"{_milliseconds(line['ms_per_token'])}{extra}, {speed}"
    return f"{_milliseconds(line['ms'] if 'ms' in line else 1e3 * line['seconds'])}, {speed}"


def _milliseconds(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g} s"
    return f"{value:,.0f} ms" if abs(value) >= 100 else f"{value:.3g} ms"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def rounded(value: Any) -> Any:
    """The value with floats to `DIGITS` significant digits, within mappings too."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def current_commit() -> str:
    """The checkout's commit, with a mark if files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
