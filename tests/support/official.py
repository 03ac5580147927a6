"""The released 48B-A3B checkpoint in numbers: its config, its tensors' names, shapes and dtypes."""

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
CONFIG = json.loads((DATA / "official_config.json").read_text())


def tensors() -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype ("BF16" or "F32") by name, all 20,493 of them."""
    found = {}
    for group in json.loads((DATA / "official_tensors.json").read_text())["groups"]:
        entry = (tuple(group["shape"]), group["dtype"])
        for layer in group.get("layers", [None]):
            for expert in range(group.get("experts", 1)):
                found[group["names"].format(layer=layer, expert=expert)] = entry
    return found
