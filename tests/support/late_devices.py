"""A CPU in the place of a device that the host is ahead of; a streamer that keeps what it got."""

from typing import Any

import pytest
import torch
from torch import Tensor


class Event:
    """What takes the place of a device's event where there is none."""

    def __init__(self, **kwargs: Any) -> None:
        pass

    def record(self) -> None:
        """Nothing: what was launched has ended."""

    synchronize = record


class Stream(list[Any]):
    """What a streamer was handed, in order."""

    def put(self, value: Tensor) -> None:
        """Take tokens."""
        self.append(value.tolist())

    def end(self) -> None:
        """Take the end."""
        self.append("end")


def look_late(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Have a module that knows devices by `LATE_DEVICE_TYPES` treat the CPU as one of them."""
    monkeypatch.setattr(module, "LATE_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(torch, "Event", Event)
