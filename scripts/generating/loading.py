"""What generate.py and chat.py share: loading a model, and the options of sampling."""

import argparse
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        greedy: Take the likeliest token every time; the other options but the penalty then mean
            nothing.
        temperature: Divides the logits; above 0.
        top_p: Sample from the likeliest tokens that hold this much probability.
        top_k: Sample from this many tokens; 0: from all.
        min_p: Leave out tokens below this fraction of the likeliest one's probability.
        repetition_penalty: Above 1 makes tokens less likely that were there before.

    Raises:
        ValueError: For a number out of range.
    """

    greedy: bool = False
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} is not allowed: above 0, or use greedy"
            )
        allowed = {
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
        }
        for name, (is_allowed, range_) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: {range_}")

    def options(self) -> dict[str, Any]:
        """Arguments for `generate()`."""
        options: dict[str, Any] = {
            "do_sample": not self.greedy,
            "repetition_penalty": self.repetition_penalty,
        }
        if not self.greedy:
            names = ("temperature", "top_p", "top_k", "min_p")
            options |= {name: getattr(self, name) for name in names}
        return options


def load(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = True,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a tokenizer and a model for generation.

    Args:
        model: Folder, or repository of the Hub.
        device: "auto" (CUDA if there is one), or a device of torch.
        dtype: "auto" (the checkpoint's), or one of `DTYPES`.
        revision: Branch, tag or commit on the Hub.
        threads: CPU threads; None: torch's choice.
        trust_remote_code: Whether the code beside the weights may run; without it Transformers' own
            class is used.

    Returns:
        The tokenizer, and the model in eval mode on the device.

    Raises:
        ValueError: For a dtype that is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be one of {DTYPES}")
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model, **source)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **source).to(device).eval()
    return tokenizer, network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `Sampling` and `load`, and `--seed`."""
    add = parser.add_argument
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--temperature", type=float, default=0.8)
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--min-p", type=float, default=0.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, help="for the same text again")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=DTYPES)
    add("--revision", help="branch, tag or commit on the Hub")
    add("--threads", type=int, help="CPU threads")
    add(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the code beside the weights",
    )
