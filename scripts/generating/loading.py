"""What generate.py and chat.py share: loading a model, and the options of sampling."""

import math
import os
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from options.settings import setting
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Which model, and how tokens are chosen; `greedy` leaves only the penalty a meaning.

    Raises:
        ValueError: For a number out of range.
    """

    model: str | os.PathLike[str] = setting(MISSING, flag=False)
    max_new_tokens: int = setting(256, "stop after that many")
    greedy: bool = setting(False, "always the likeliest token")
    temperature: float = setting(0.8, "divides the logits")
    top_p: float = setting(1.0, "sample from the likeliest tokens that hold this probability")
    top_k: int = setting(0, "sample from this many tokens; 0: from all")
    min_p: float = setting(0.0, "leave tokens out below this fraction of the likeliest one's")
    repetition_penalty: float = setting(1.0, "above 1: tokens that were there are less likely")
    seed: int | None = setting(None, "for the same text again")
    device: str = setting("auto", "CUDA if there is one, or a device of torch")
    dtype: str = setting("auto", "auto: the checkpoint's", choices=DTYPES)
    revision: str | None = setting(None, "branch, tag or commit on the Hub")
    threads: int | None = setting(None, "CPU threads")
    trust_remote_code: bool = setting(True, "run the code beside the weights")
    quiet: bool = setting(False, "nothing on stderr")

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} is not allowed: above 0, or use greedy"
            )
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "it must be at least 1"),
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

    def load(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Tokenizer and model; see the function of this name."""
        if self.quiet:
            logging.disable_progress_bar()
        names = ("device", "dtype", "revision", "threads", "trust_remote_code")
        return load(self.model, **{name: getattr(self, name) for name in names})


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
