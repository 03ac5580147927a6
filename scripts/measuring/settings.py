"""What `benchmark.py` is asked to measure, checked."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from generating.loading import DTYPES
from kimi_linear import PRESETS

from measuring.models import MODELS

MEASURES = ("prefill", "decode", "generate", "first-token", "train", "first-call")
DEVICES = ("auto", "cuda", "cpu")
SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        preset: Name of the size, see `presets.py`.
        train_preset: The size for "train"; None: `preset`.
        models: Some of `MODELS`, in the order in which they are measured.
        measure: Some of `MEASURES`.
        device: One of `DEVICES`; "auto": CUDA if there is one.
        dtype: One of `generating.loading.DTYPES`; "auto": bfloat16 on a GPU, float32 on a CPU.
        contexts: Tokens, for "prefill", "decode" and "first-token".
        batches: Rows, for "generate".
        prompt_length, new_tokens: Tokens, for "generate", "decode" and "first-call".
        prefill_chunk: Tokens of a call while a text is read; None: all at once in "prefill", a
            default elsewhere.
        train_tokens: Tokens of the packed row, for "train".
        repeats: Runs per figure at most, after a warm-up.
        time_limit: Seconds after which no measurement is begun; each model gets its share. None:
            no limit.
        threads: CPU threads; None: torch's choice. Where others use the cores too, one is faster.

    Raises:
        ValueError: For a value out of range.
    """

    preset: str = "2m"
    train_preset: str | None = None
    models: Sequence[str] = MODELS
    measure: Sequence[str] = ("prefill", "decode", "generate", "first-token", "train")
    device: str = "auto"
    dtype: str = "auto"
    contexts: Sequence[int] = (128, 512)
    batches: Sequence[int] = (1, 2)
    prompt_length: int = 512
    new_tokens: int = 16
    prefill_chunk: int | None = None
    train_tokens: int = 512
    repeats: int = 3
    time_limit: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "preset": PRESETS,
            "train_preset": (None, *PRESETS),
            "models": MODELS,
            "measure": MEASURES,
            "device": DEVICES,
            "dtype": DTYPES,
        }
        for name, allowed in choices.items():
            given = getattr(self, name)
            several = name in ("models", "measure")
            for value in given if several else (given,):
                names = ", ".join(str(choice) for choice in allowed if choice is not None)
                _require(value in allowed, name, value, f"one of {names}")
            _require(not several or len(given) > 0, name, given, "at least one")
        for name in ("contexts", "batches"):
            values = getattr(self, name)
            is_allowed = len(values) > 0 and min(values) >= 1
            _require(is_allowed, name, values, "one or more integers of at least 1")
        for name in ("prompt_length", "new_tokens", "repeats", "prefill_chunk", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.train_tokens >= 16, "train_tokens", self.train_tokens, "at least 16")
        limit = self.time_limit
        _require(limit is None or limit > 0, "time_limit", limit, "above 0")
        has_device = self.device != "cuda" or torch.cuda.is_available()
        _require(has_device, "device", self.device, "cpu, since there is no CUDA device")

    def torch_device(self) -> torch.device:
        """The device itself."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        if self.dtype == "auto":
            return torch.float32 if self.torch_device().type == "cpu" else torch.bfloat16
        return getattr(torch, self.dtype)


def _require(is_allowed: bool, name: str, value: Any, allowed: str) -> None:
    if not is_allowed:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} {value!r} is not allowed: it must be {allowed}")


def number(text: str) -> int:
    """An integer, perhaps in units of 1,024 ("k") or 1,048,576 ("m")."""
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    try:
        return factor * int(text if factor == 1 else text[:-1])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be an integer such as 512, 4k or 1m"
        ) from None


def numbers(text: str) -> tuple[int, ...]:
    """Several of them, separated by commas."""
    return tuple(number(part) for part in text.split(","))
