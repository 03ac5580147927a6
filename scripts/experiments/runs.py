"""What the scripts `experiment_*.py` share: settings that are checked, JSON lines that are appended
as they come, budgets of time, fewer choices for Triton's autotuners.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring.report import Line, environment, rounded, say
from measuring.settings import number

DEVICES = ("auto", "cuda", "cpu")


def require(is_allowed: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ValueError, naming the flag, unless the value is allowed."""
    if not is_allowed:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} {value!r} is not allowed: it must be {allowed}")


def require_some(name: str, values: Sequence[Any], allowed: Iterable[Any]) -> None:
    """Raise ValueError unless there is a value and each is one of those allowed."""
    allowed = tuple(allowed)
    names = ", ".join(str(choice) for choice in allowed)
    require(len(values) > 0, name, values, f"one or more of {names}")
    for value in values:
        require(value in allowed, name, value, f"one of {names}")


def choose_device(name: str) -> torch.device:
    """The device; "auto" is CUDA if there is one.

    Raises:
        ValueError: For an unknown name, and for "cuda" where there is none.
    """
    require_some("device", [name], DEVICES)
    has_cuda = torch.cuda.is_available()
    require(name != "cuda" or has_cuda, "device", name, "cpu, since there is no CUDA device")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


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

    def begin(self, device: torch.device, commit: str | None, **settings: Any) -> None:
        """The first line, which says what is run, where, and with what."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        command = ["python", *sys.argv]
        self.tell("environment", **environment(device, command, commit), settings=settings)


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


def limit_autotuning(count: int, share: tuple[int, int] = (0, 1)) -> None:
    """Let Triton's autotuners choose among their first `count` configurations; 0: among all.

    Compiling them all takes minutes in a new process, and which one is chosen changes a kernel's
    speed only. It has to be called before FLA is imported.

    Args:
        count: How many.
        share: (i, n): of these only every n-th from the i-th on, but at least one. Processes beside
            each other compile all of them so, for those that come after.

    Raises:
        ValueError: For a negative number.
    """
    require(count >= 0, "autotune", count, "0 (all) or the number of configurations")
    is_all = count == 0 and share == (0, 1)
    if is_all or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.autotuner import Autotuner

    original = getattr(Autotuner, "_all_configs_init", Autotuner.__init__)

    def init(self: Any, fn: Any, arg_names: Any, configs: list[Any], *args: Any, **kw: Any) -> None:
        first = configs[: count or None]
        chosen = first[share[0] :: share[1]] or first[:1]
        original(self, fn, arg_names, chosen, *args, **kw)

    Autotuner._all_configs_init = original
    Autotuner.__init__ = init


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


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(text.split(","))


def floats(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be numbers separated by commas, such as 1e-3,5e-4"
        ) from None


def add_counts(add: Callable[..., Any], default: Any, texts: Mapping[str, str]) -> None:
    """Flags of numbers, by the fields' names and what they are; `default` has the fields."""
    for name, text in texts.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=number, default=getattr(default, name), metavar="N", help=text)


def add_common(add: Callable[..., Any], output: str) -> None:
    """The flags that every experiment has."""
    add("--device", default="auto", help=", ".join(DEVICES))
    add("--time-limit", type=float, metavar="SECONDS", help="end what runs after that")
    add("--output", metavar="FILE", help=f"append the JSON lines here, such as {output}")
    add("--commit", help="what is measured, where git cannot tell")


def run_main(main: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Call `main` with the command line's arguments; a ValueError is the user's mistake."""
    arguments = vars(parser.parse_args())
    try:
        main(**arguments)
    except ValueError as problem:
        parser.error(str(problem))


__all__ = [
    "Clock",
    "Lines",
    "add_common",
    "add_counts",
    "choose_device",
    "floats",
    "limit_autotuning",
    "names",
    "parse_share",
    "read_experiment",
    "require",
    "require_some",
    "run_main",
    "say",
]
