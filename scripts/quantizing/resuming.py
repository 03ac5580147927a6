"""The folder of a run that may be killed: whole files stay, and the same run goes on there."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_linear.checkpoints.atomic import resumable_folder
from quantizing.plan import Plan
from quantizing.writing import UNFINISHED

SETTINGS = "quantize.json"
# Of which a change changes the files.
FORMAT = 1


@contextmanager
def draft_of(output: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `output` to write to, which takes its name at the end; after an error or a
    kill it stays, for a run of the same settings.

    Args:
        output: The folder to make.
        settings: What decides the bytes of its files, of JSON's types.

    Raises:
        ValueError: The folder is of a run with other settings; the message names what differs.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with resumable_folder(output) as draft:
        file = draft / SETTINGS
        if file.is_file():
            _check_same(draft, json.loads(file.read_text(encoding="utf-8")), settings)
        else:
            unfinished = draft / f"{SETTINGS}{UNFINISHED}"
            if any(path != unfinished for path in draft.iterdir()):
                raise ValueError(f"{draft} has no {SETTINGS}, and is in the way: remove it")
            unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            unfinished.rename(file)
        yield draft
    (output / SETTINGS).unlink()


def _check_same(draft: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    earlier, later = _flat(before), _flat(now)
    for name in [*later, *(name for name in earlier if name not in later)]:
        if earlier.get(name) != later.get(name):
            raise ValueError(
                f"{name} is {later.get(name)!r}, and was {earlier.get(name)!r} in the unfinished "
                f"run in {draft}: repeat that run, or remove the folder to begin anew"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def settings_of(plan: Plan, device: str, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """What decides the bytes of a run's files."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in plan.files}
    return {
        "format": FORMAT,
        "snapshot": str(plan.folder.resolve()),
        "config": hashlib.sha256(json.dumps(plan.fields).encode()).hexdigest(),
        "files": files,  # sizes, times of change
        "quantization": plan.quantization.to_dict(),
        "device": device,
        "calibration": calibration,
    }
