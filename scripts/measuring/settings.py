"""What `benchmark.py` is asked to measure."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from generating.loading import DTYPES
from options.settings import check_settings, require, require_some, setting

from kimi_linear import PRESETS
from measuring.forms import NONE, check_forms
from measuring.models import MODELS
from measuring.requests import Workload

MEASURES = (
    "prefill",
    "decode",
    "generate",
    "first-token",
    "train",
    "first-call",
    "memory",
    "step",
    "requests",
)
DEFAULT_MEASURES = MEASURES[:5]
DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and where the figures go.

    Attributes:
        time_limit: Seconds after which no measurement is begun; each model gets its share.
        threads: Where others use the cores too, one is faster.

    Raises:
        ValueError: For a value that is not allowed.
    """

    preset: str = setting("2m", "size, see presets.py", choices=PRESETS)
    train_preset: str | None = setting(None, "size for train; else --preset", choices=PRESETS)
    models: Sequence[str] = setting(MODELS, "in this order", choices=MODELS)
    quantize: Sequence[str] = setting(
        (NONE,),
        "weights of ours, in this order: none,24gb,48gb,80gb,fp8,fp8w, or parts (see above)",
    )
    measure: Sequence[str] = setting(
        DEFAULT_MEASURES, "default: all but the last four", choices=MEASURES
    )
    device: str = setting("auto", choices=DEVICES)
    dtype: str = setting("auto", "auto: bfloat16 on a GPU, float32 on a CPU", choices=DTYPES)
    contexts: Sequence[int] = setting((128, 512), "tokens, such as 4k,32k,1m", least=1)
    batches: Sequence[int] = setting(
        (1, 2), "rows of generate, such as 1,8,32; of requests at most", least=1
    )
    step_tokens: Sequence[int] = setting((1, 2, 4, 8, 16), "tokens of a call, for step", least=1)
    prompt_length: int = setting(512, "tokens, for generate, step and first-call", least=1)
    new_tokens: int = setting(16, "for generate, decode and first-call", least=1)
    request_count: int = setting(256, "for requests", least=1)
    request_prompts: Sequence[int] = setting((64, 2048), "fewest and most tokens", least=1)
    request_answers: Sequence[int] = setting((16, 512), "fewest and most tokens", least=1)
    prefill_chunk: int | None = setting(None, "tokens of a call while a text is read", least=1)
    train_tokens: int = setting(512, "tokens of the packed row", least=16)
    repeats: int = setting(3, "runs per figure at most, after a warm-up", least=1)
    time_limit: float | None = setting(
        None, "begin no measurement after that", above=0, metavar="SECONDS"
    )
    memory_limit: float | None = setting(
        None, "that memory's allocator may take; else the card's", above=0, metavar="GIGABYTES"
    )
    threads: int | None = setting(None, "CPU threads; else torch's choice", least=1)
    output: str | os.PathLike[str] | None = setting(
        None, "write the JSON lines here too", metavar="FILE"
    )
    append: bool = setting(False, "keep what --output holds, and write behind it")
    plot: str | os.PathLike[str] | None = setting(
        None, "draw speed and memory over context and batch", metavar="PNG"
    )
    plot_limits: str | os.PathLike[str] | None = setting(
        None, "draw how near each figure is to its limit", metavar="PNG"
    )
    plot_from: Sequence[str | os.PathLike[str]] = setting((), flag=False)
    commit: str | None = setting(None, "what is measured, where git cannot tell")

    def __post_init__(self) -> None:
        check_settings(self)
        choose_device(self.device)
        check_forms(self.quantize)
        for name in ("request_prompts", "request_answers"):
            numbers = getattr(self, name)
            is_range = len(numbers) == 2 and numbers[0] <= numbers[1]
            require(is_range, name, numbers, "two numbers, the smaller one first")

    def subjects(self) -> list[tuple[str, str]]:
        """Models and how their weights are held, in the order in which they are measured."""
        forms = {kind: self.quantize if kind == "ours" else (NONE,) for kind in MODELS}
        return [(kind, form) for kind in self.models for form in forms[kind]]

    def workload(self) -> Workload:
        """What requests ask."""
        (fewest, most), (shortest, longest) = self.request_prompts, self.request_answers
        return Workload(self.request_count, (fewest, most), (shortest, longest))

    def torch_device(self) -> torch.device:
        """The device itself."""
        return choose_device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        if self.dtype == "auto":
            return torch.float32 if self.torch_device().type == "cpu" else torch.bfloat16
        return getattr(torch, self.dtype)


def choose_device(name: str) -> torch.device:
    """The device; "auto" is CUDA if there is one.

    Raises:
        ValueError: For an unknown name, and for "cuda" where there is none.
    """
    require_some("device", [name], DEVICES)
    has_cuda = torch.cuda.is_available()
    require(name != "cuda" or has_cuda, "device", name, "cpu, since there is no CUDA device")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")
