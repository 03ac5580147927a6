"""Prints what the tests are about to run with; a layer of `.ci/run` must have its own packages."""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

MODULES = {"fla-core": "fla"}
NAMES = ("transformers", "huggingface_hub", "torch", "peft", "trl", "triton", "fla-core")


def main() -> None:
    layer = Path(sys.prefix, "layer.txt")
    wanted = layer.read_text().split() if layer.exists() else []
    for name, number in (each.split("==") for each in wanted if "==" in each):
        assert version(name) == number, f"{name} is {version(name)} in a layer with {number}"
    is_there = {name: importlib.util.find_spec(MODULES.get(name, name)) for name in NAMES}
    print(*[f"{name} {version(name) if there else 'none'}" for name, there in is_there.items()])


if __name__ == "__main__":
    main()
