"""What every line of a benchmark says about where it was measured, and how lines are written."""

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from measuring.report import current_commit


def environment() -> dict[str, Any]:
    """Versions, threads, processor or GPU, commit."""
    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": current_commit(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        try:
            import fla
        except ImportError:
            found["fla"] = "none"
        else:
            found["fla"] = fla.__version__
    return found


def line_writer(record: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that prints a line of JSON and, if there is a file, appends it at once, so that a
    run that is cut off keeps what it has. The file is emptied first."""
    if record is not None:
        record.write_text("")

    def tell(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if record is not None:
            with record.open("a") as file:
                file.write(text + "\n")

    return tell
