"""What a test of a touchpoint says when Transformers has changed it, and where each is."""

import importlib
from typing import Any

import transformers

from kimi_linear.upstream.releases import TESTED

CHANGED = (
    f"Transformers {transformers.__version__} has changed it since {TESTED[1]}, the last release "
    "that this package was tested with; see upstream/"
)


def find(where: str) -> Any:
    """What stands at "module:path" of Transformers."""
    module, _, path = where.partition(":")
    found = importlib.import_module(f"transformers.{module}")
    for name in path.split("."):
        assert hasattr(found, name), f"transformers.{where} is gone: {CHANGED}"
        found = getattr(found, name)
    return found
