"""Python's part of scripts/export_gguf.py, forked, without the seconds of its imports."""

import sys
from collections.abc import Sequence
from pathlib import Path

import commands
import exporting
from exporting.checks import ExportError


def run_python(file: str, arguments: Sequence[str], what: str, text: str = "") -> str:
    """In place of `exporting.programs.run_python`."""
    done = commands.run([Path(exporting.__file__).with_name(file), *arguments], text)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [""])[-1]
        raise ExportError(f"{what} failed with status {done.returncode}: {why}")
    return done.stdout
