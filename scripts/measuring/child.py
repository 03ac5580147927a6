"""Measurements in a process of their own, which prints JSON objects as it goes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SCRIPTS = Path(__file__).parents[1]


class ChildError(RuntimeError):
    """A process that did not end as it should.

    Attributes:
        figures: What it had measured by then.
        is_late: Whether its time was up.
    """

    def __init__(self, message: str, figures: dict[str, Any], is_late: bool = False) -> None:
        super().__init__(message)
        self.figures, self.is_late = figures, is_late


def run_child(
    module: str,
    options: Mapping[str, Any],
    seconds: float,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a module of `scripts/` with options as one JSON object.

    Args:
        module: Such as "measuring.first_call".
        options: Its argument.
        seconds: Its time; may be infinite.
        variables: Of its environment, beside this one's.

    Returns:
        The objects that it printed, in one: a later one's figures count.

    Raises:
        ChildError: If it fails, or its time is up.
    """
    paths = [str(SCRIPTS), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **(variables or {}),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(options)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=None if seconds == float("inf") else max(0.0, seconds),
        )
    except subprocess.TimeoutExpired as late:
        raise ChildError("its time is up", _figures(late.stdout), is_late=True) from None
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        message = f"the process ended with {done.returncode}: {reason}"
        raise ChildError(message, _figures(done.stdout))
    return _figures(done.stdout)


def _figures(output: str | bytes | None) -> dict[str, Any]:
    """The objects of whole lines; whatever else a library printed is left out."""
    text = output.decode() if isinstance(output, bytes) else output or ""
    figures: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            figures |= found
    return figures
