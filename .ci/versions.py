"""Prints what the tests are about to run with."""

import importlib.util
from importlib.metadata import version

NAMES = ("transformers", "huggingface_hub", "torch", "peft", "trl", "triton", "fla-core")

have = {"fla-core": "fla"}
for name in NAMES:
    is_there = importlib.util.find_spec(have.get(name, name)) is not None
    print(name, version(name) if is_there else "none", end="  ")
print()
