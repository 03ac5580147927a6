"""What every experiment has: its settings, JSON lines that are appended as they come, a budget of
time."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring.report import Line, environment, rounded
from measuring.settings import DEVICES, choose_device
from options.settings import check_settings, recorded, require, setting


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings that every experiment has; lines tell all others.

    Raises:
        ValueError: For a value that is not allowed.
    """

    device: str = setting("auto", choices=DEVICES, recorded=False)
    time_limit: float | None = setting(
        None, "end what runs after that", above=0, metavar="SECONDS", recorded=False
    )
    output: str | os.PathLike[str] | None = setting(
        None, "append the JSON lines here", metavar="FILE", recorded=False
    )
    commit: str | None = setting(None, "what is measured, where git cannot tell", recorded=False)

    def __post_init__(self) -> None:
        check_settings(self)

    def start(self, experiment: str) -> "tuple[Clock, torch.device, Lines]":
        """The budget of time, which begins now, the device, and where lines go."""
        path = None if self.output is None else Path(self.output)
        return Clock(self.time_limit), choose_device(self.device), Lines(experiment, path)


class Lines:
    """Prints each line as JSON and appends it to a file at once: a run that is cut off keeps what
    it has, and runs beside each other may share a file.

    Args:
        experiment: Stands in every line.
        path: The file; None: no file.

    Attributes:
        before: Lines that runs before this one left in the file.
        lines: Those of this run.
    """

    def __init__(self, experiment: str, path: Path | None) -> None:
        self.experiment, self.path = experiment, path
        has_file = path is not None and path.exists()
        self.before = read_experiment([path], experiment) if has_file else []
        self.lines: list[Line] = []

    def tell(self, event: str, **figures: Any) -> Line:
        """Take one more line."""
        line = rounded({"experiment": self.experiment, "event": event, **figures})
        text = json.dumps(line)
        line = json.loads(text)  # as a reader of the file sees it
        self.lines.append(line)
        print(text, flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(text + "\n")
        return line

    def finished(self, *keys: str) -> set[tuple[Any, ...]]:
        """The values of these keys in the lines of trainings that ended before, not in an error."""
        ends = [line for line in self.before if line["event"] == "run" and "error" not in line]
        return {tuple(line[key] for key in keys) for line in ends}

    def begin(self, device: torch.device, settings: RunSettings, **more: Any) -> None:
        """The first line, which says what is run, where, and with what."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        found = environment(device, ["python", *sys.argv], settings.commit)
        self.tell("environment", **found, settings={**recorded(settings), **more})


def read_experiment(paths: Iterable[Path], experiment: str) -> list[Line]:
    """The lines of one experiment in files that hold any; what a cut-off run left half is skipped.

    Raises:
        ValueError: For a file that is not there.
    """
    lines = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not allowed: it must be a file of JSON lines")
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and line.get("experiment") == experiment:
                lines.append(line)
    return lines


class Clock:
    """A budget of seconds that parts of a run share.

    Args:
        seconds: All of it; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        require(seconds is None or seconds > 0, "time_limit", seconds, "above 0")
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def share(self, parts_left: int) -> float:
        """When the first of so many parts has to end, in `time.monotonic()`'s seconds."""
        now = time.monotonic()
        return now + max(0.0, self.end - now) / max(1, parts_left)


def parse_share(text: str) -> tuple[int, int]:
    """ "2/4": the third of four shares, counted from 0."""
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be i/n with i from 0 to n - 1, such as 0/4"
        )
    return i, n
