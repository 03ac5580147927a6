"""What the measurements here share: flags, lines of JSON, and a path to the modules of `scripts/`,
which is why it is imported before them."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from measuring.report import Recorder, current_commit, environment

ROOT = Path(__file__).parents[1]

__all__ = ["ROOT", "Recorder", "current_commit", "make_parser", "setting"]


def setting(commit: str | None = None) -> dict[str, Any]:
    """Where and with what is measured: device, versions, commit, command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return environment(device, ["python", *sys.argv], commit)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the docstring as its description and the flag `--record`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="write the lines to this file too")
    return parser
