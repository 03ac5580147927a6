"""Cache and decoding of Kimi Linear beside the same model with latent attention in every layer
(arXiv 2510.26692, section 5.6, figures 1b and 7b).

Both models come from one preset, with random weights, and run by the same code: the decode graph
where it can run. Measured are the bytes of the cache and the time of a step of greedy decoding, for
one row and for as many rows as fit. The byte limit is the time to read the active weights, states
and latents once at the device's measured rate (`measuring/limits.py`). Of the attention alone, the
limit's ratio tends to the layers' numbers, 27 / 7 = 3.86 for the 48B model.

A context is not read token by token: a short text is read, and its latents are repeated up to the
context's length. A step reads as many bytes and does as much work as behind a real text; what it
predicts means nothing. States have their full size after any text.

On a CPU, to see that it runs; on one GPU that holds the 48B model's shape; on a smaller one with
fewer experts, of which a token uses as many; with weights in few bits too, which leave room for
more rows:

    python scripts/experiment_decoding.py --preset 2m --contexts 64,256 --steps 8
    python scripts/experiment_decoding.py --preset 48b-a3b --time-limit 480 \\
        --output benchmarks/results/experiment_decoding.jsonl
    python scripts/experiment_decoding.py --preset 48b-a3b --experts 64 --time-limit 480
    python scripts/experiment_decoding.py --preset 48b-a3b --models kimi --quantize none,48gb,24gb

Lines: "decode", or with "error" what could not be measured. `ms_per_step` is one token for every
row; `ms_per_token` is that divided by the rows. `quantize` says how packed weights are held, as
`benchmark.py --help` names it.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from experiments.runs import Lines, RunSettings
from measuring.device import collect_garbage, measure_rates, synchronise
from measuring.forms import NONE, check_forms, quantization
from measuring.limits import Limits
from measuring.models import build
from measuring.report import say
from options.settings import command_parser, run_main, setting
from torch import Tensor

from kimi_linear import PRESETS, KimiLinearCache, KimiLinearConfig
from kimi_linear.decode.graph import has_recording

PATTERNS = ("kimi", "mla")
CONTEXTS = tuple(1 << n for n in (12, 15, 17, 18, 19, 20))
# Rows that a recorded step takes.
MAX_ROWS = 256
# Read to begin a cache; of many rows less each.
TEXT_TOKENS, TEXT_TOKENS_ALL_ROWS = 1024, 16384
WARM_UP_STEPS = 8
PIECE_TOKENS = 16384
MESSAGE_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What is measured."""

    preset: str = setting("48b-a3b", "size, see presets.py", choices=PRESETS)
    experts: int | None = setting(None, "routed experts, in place of the preset's")
    models: Sequence[str] = setting(PATTERNS, choices=PATTERNS)
    quantize: Sequence[str] = setting((NONE,), "weights, in this order: none, 48gb, 24gb, ...")
    contexts: Sequence[int] = setting(CONTEXTS, "such as 4k,128k,1m", least=32)
    steps: int = setting(64, "tokens of a run", least=1)
    repeats: int = setting(3, "runs of which the median counts", least=1)
    max_rows: int = setting(MAX_ROWS, "rows at most", least=1)
    spare_gigabytes: float = setting(4.0, "memory left alone when rows are counted", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_forms(self.quantize)

    def config(self, pattern: str) -> KimiLinearConfig:
        """The preset's, for "mla" with latent attention in every layer."""
        fields = {} if self.experts is None else {"num_experts": self.experts}
        config = KimiLinearConfig.from_preset(self.preset, **fields)
        if pattern == "kimi":
            return config
        layers = list(range(1, config.num_hidden_layers + 1))
        linear = {**config.linear_attn_config, "kda_layers": [], "full_attn_layers": layers}
        return KimiLinearConfig.from_preset(self.preset, **fields, linear_attn_config=linear)


class Subject:
    """One model, and its steps behind caches of any length.

    Args:
        settings: What is measured.
        form: How its weights are held.
        limits: What the device allows.
        device: Where the model is.
    """

    def __init__(self, settings: Settings, form: str, limits: Limits, device: torch.device) -> None:
        self.settings, self.limits, self.device = settings, limits, device
        self.model: Any = build(
            "ours",
            limits.config,
            device=device,
            dtype=limits.dtype,
            quantization=quantization(form),
        )
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.graph_error = ""

    @torch.no_grad()
    def decode(self, context: int, rows: int) -> dict[str, Any]:
        """Figures of greedy steps of `rows` rows behind `context` tokens each."""
        settings = self.settings
        cache, token = self._filled_cache(context, rows)
        token = self._warm_up(cache, token)
        times = []
        for _ in range(settings.repeats):
            synchronise(self.device)
            start = time.perf_counter()
            token = self._steps(cache, token, settings.steps)
            synchronise(self.device)
            times.append((time.perf_counter() - start) / settings.steps)
        ms = 1e3 * statistics.median(times)
        # a step reads the tokens before it too
        middle = context + WARM_UP_STEPS + settings.repeats * settings.steps // 2
        limit = self.limits.decode(middle, rows)
        return {
            "context": context,
            "rows": rows,
            "ms_per_step": ms,
            "ms_per_token": ms / rows,
            "tokens_per_second": 1e3 * rows / ms,
            "spread_ms": 1e3 * (max(times) - min(times)),
            "cache_bytes": cache.cache_memory(),
            "cache_bytes_needed": self.limits.cache_bytes(context, rows),
            "limit_ms": limit["ms"],
            "limit": {key: limit[key] for key in ("weight_bytes", "state_bytes", "latent_bytes")},
            "backend": self._backend(rows),
            "parameters": self.parameters,
        }

    def rows_that_fit(self, cache_bytes: int) -> int:
        """How many rows' caches of so many bytes each there is memory for."""
        if self.device.type != "cuda":
            return min(2, self.settings.max_rows)
        collect_garbage(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] - self.settings.spare_gigabytes * 1e9
        return max(1, min(self.settings.max_rows, int(free / cache_bytes)))

    def _filled_cache(self, context: int, rows: int) -> tuple[KimiLinearCache, Tensor]:
        """A cache of `context` tokens, and the token to go on with [rows, 1]."""
        settings, config = self.settings, self.limits.config
        steps = WARM_UP_STEPS + settings.steps * settings.repeats
        cache = KimiLinearCache(config, reserve_tokens=context + steps)
        size = max(16, min(TEXT_TOKENS, TEXT_TOKENS_ALL_ROWS // rows, context // 2))
        generator = torch.Generator().manual_seed(context)
        text = torch.randint(config.vocab_size, (rows, size), generator=generator)
        out = self.model(text.to(self.device), cache=cache, logits_to_keep=1)
        for layer in cache.layers:
            if hasattr(layer, "segments"):
                _repeat_latents(layer, size, context)
            else:
                layer.num_tokens = context
        return cache, out.logits[:, -1:].argmax(-1)

    def _warm_up(self, cache: KimiLinearCache, token: Tensor) -> Tensor:
        """Steps that record the graph, where there can be one."""
        self.graph_error = ""
        if self.device.type == "cuda":
            self.model.decode_backend = "graph"  # says what is in the way
        try:
            return self._steps(cache, token, WARM_UP_STEPS)
        except ValueError as error:
            self.graph_error = str(error)[:MESSAGE_LENGTH]
            self.model.decode_backend = "eager"
            return self._steps(cache, token, WARM_UP_STEPS)

    def _steps(self, cache: KimiLinearCache, token: Tensor, count: int) -> Tensor:
        for _ in range(count):
            token = self.model(token, cache=cache).logits[:, -1:].argmax(-1)
        return token

    def _backend(self, rows: int) -> str:
        """How the steps ran: a cache that is not ready for the graph is no error to the model."""
        if has_recording(self.model, rows) and not self.graph_error:
            return "graph"
        return f"layer by layer: {self.graph_error or 'no CUDA'}"


def _repeat_latents(layer: Any, size: int, context: int) -> None:
    """Let a layer that holds `size` tokens hold `context`: the same ones again and again."""
    latent = torch.cat(layer.segments(), dim=1)
    pieces = min(-(-PIECE_TOKENS // latent[:, :, 0].numel()), -(-context // size))
    latent = latent.repeat(1, pieces, 1)
    while layer.num_tokens < context:
        layer.update(latent[:, : context - layer.num_tokens])


def main(**options: Any) -> list[Any]:
    """Measure the models, with each kind of weights, at every context, for one row and for as many
    as fit.

    Args:
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    clock, where, lines = settings.start("decoding")
    configs = {pattern: settings.config(pattern) for pattern in settings.models}
    subjects = [(pattern, form) for pattern in configs for form in settings.quantize]
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    rates = measure_rates(where, dtype)
    collect_garbage(where)
    rate_fields = {key: float(f"{value:.5g}") for key, value in vars(rates).items()}
    lines.begin(where, settings, **rate_fields)
    for i, (pattern, form) in enumerate(subjects):
        deadline = clock.share(len(subjects) - i)
        limits = Limits.of(configs[pattern], dtype, rates, quantization(form))
        subject = Subject(settings, form, limits, where)
        names = {"model": pattern, "preset": settings.preset}
        _measure(subject, names | ({} if form == NONE else {"quantize": form}), deadline, lines)
        del subject
        collect_garbage(where)
    return lines.lines


def _measure(subject: Subject, names: dict[str, str], deadline: float, lines: Lines) -> None:
    """One row at every context, then as many as fit."""
    sizes: dict[int, int] = {}
    for context in sorted(set(subject.settings.contexts)):
        figures = _attempt(subject, names, context, 1, deadline, lines)
        if "error" not in figures:
            sizes[context] = sum(figures["cache_bytes"].values())
    for context, size in sorted(sizes.items(), reverse=True):
        rows = subject.rows_that_fit(size)
        while rows > 1:  # with one row it is measured already
            figures = _attempt(subject, names, context, rows, deadline, lines)
            if "OutOfMemory" not in figures.get("error", ""):
                break
            rows = rows * 3 // 4


def _attempt(
    subject: Subject, names: dict[str, str], context: int, rows: int, deadline: float, lines: Lines
) -> dict[str, Any]:
    """Measure and tell one line; whatever goes wrong becomes its "error"."""
    place: dict[str, Any] = {**names, "context": context, "rows": rows}
    start = time.monotonic()
    if start > deadline:
        return dict(lines.tell("decode", **place, error="not run: --time-limit is spent"))
    say(f"{' '.join(names.values())}: {context} tokens, {rows} rows ...")
    try:
        figures = subject.decode(context, rows)
    # any kind: what cannot be measured is a result, and the others are still wanted
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]}
    collect_garbage(subject.device)
    line = lines.tell("decode", **{**place, **figures}, seconds=time.monotonic() - start)
    return dict(line)


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
