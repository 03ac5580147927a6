"""llama.cpp's checkout and the programs that were built in it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from exporting.checks import ExportError

# Where cmake, the Makefile of old and the released archives put programs.
PLACES = ("build/bin", "build/bin/Release", "bin", ".")
# What a line of llama.cpp's says when it fails; others follow.
ERROR = re.compile(r"\berror\b|ASSERT")
NEEDED = ("convert_hf_to_gguf.py", "conversion/kimi_linear.py", "gguf-py/gguf/__init__.py")


def check_checkout(folder: Path) -> None:
    """Check that a folder has llama.cpp's converter for this architecture.

    Raises:
        ValueError: It does not.
    """
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ValueError(
                f"--llama-cpp {folder} has no {name}; allowed: a checkout of llama.cpp that knows "
                "Kimi Linear (releases b11739 and newer were tried)"
            )


def find_program(checkout: Path, name: str) -> Path | None:
    """A program of llama.cpp: the checkout's, else one in PATH."""
    for place in PLACES:
        for file in (checkout / place / name, checkout / place / f"{name}.exe"):
            if file.is_file() and os.access(file, os.X_OK):
                return file
    found = shutil.which(name)
    return None if found is None else Path(found)


def require_program(checkout: Path, name: str, purpose: str) -> Path:
    """The same; ValueError, with how to build it, where there is none."""
    found = find_program(checkout, name)
    if found is None:
        raise ValueError(
            f"{purpose} needs {name}, which is neither in {checkout / PLACES[0]} nor in PATH: "
            f"cmake -B build && cmake --build build --target {name}, in {checkout}"
        )
    return found


def run_program(
    command: Sequence[str | os.PathLike[str]], what: str, on_line: Callable[[str], None]
) -> None:
    """Run a program.

    Args:
        command: Its path and arguments.
        what: It does, as in "quantising", for the message.
        on_line: Gets each line that it writes, to either stream.

    Raises:
        ExportError: It failed; the message has its last line that tells of an error, or the last.
    """
    last = error = ""
    with subprocess.Popen(
        [os.fspath(part) for part in command],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = last if line.startswith("warning:") else line.strip() or last
            error = last if ERROR.search(last) else error
            on_line(line)
    if process.returncode != 0:
        raise ExportError(f"{what} failed: {error or last or process.returncode}")


def run_python(file: str, arguments: Sequence[str], what: str, text: str = "") -> str:
    """Run a file of this folder in a process of its own, which finds none of its neighbours. What
    it writes to stderr is passed on.

    Returns:
        What it writes to stdout.

    Raises:
        ExportError: It failed.
    """
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("NO_LOCAL_GGUF", None)
    command = [sys.executable, "-P", str(Path(__file__).with_name(file)), *arguments]
    done = subprocess.run(
        command, env=environment, input=text, stdout=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode != 0:
        raise ExportError(f"{what} failed with status {done.returncode}; it says above why")
    return done.stdout
