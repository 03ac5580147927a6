"""Constants of the recorded step's kernels, tried one after the other on the whole step.

What a kernel takes by itself says little, since each begins while the one before it runs. So a
constant is changed, the step recorded anew and timed; what makes it faster by a third of a percent
stays. A choice whose logits are other ones than before is not taken, however fast.

    python benchmarks/tune_step.py --quantize 48gb --rows 1 --seconds 240 \\
        --record benchmarks/results/step_constants_h200.jsonl

Lines: the setting; "start", constants and milliseconds a step; "tried", one constant's value, the
step's time and the best one before it; "end", what stayed. The steps are behind a prompt of 512
tokens, on the 48B model's shape with random weights.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.device import synchronise
from measuring.forms import NONE, quantization
from measuring.models import build, new_cache
from torch import Tensor

from kimi_linear import KimiLinearConfig
from kimi_linear.decode import few_rows, fixed_point, many_rows, packed_few_rows, step
from kimi_linear.decode.few_rows import FewRowsStep
from kimi_linear.decode.fixed_point import Tile
from kimi_linear.decode.graph import drop_recordings
from kimi_linear.decode.packed_few_rows import PackedFewRowsStep
from kimi_linear.decode.step import DecodeStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, WARM_UP, REPEATS, PROMPT = 150, 8, 3, 512
# Less than this is noise.
GAIN = 0.003
# What logits may differ by, of their length: sums of another order choose another expert at times.
TOLERANCE = 0.2
TILES = {
    "rows": (32, 64, 128),
    "warps": (1, 2, 4, 8),
    "stages": (2, 3, 4, 5, 6),
    "early": (0, 1, 2, 3, 4),
}


@dataclass(frozen=True)
class Constant:
    """One that is tried.

    Attributes:
        name: As lines have it.
        holders: Modules, classes or dictionaries that have it, all alike.
        key: Its name there.
        values: To try.
        field: Of a `Tile`, which is tried alone; empty: all of it is one value.
    """

    name: str
    holders: tuple[Any, ...]
    key: Any
    values: tuple[Any, ...]
    field: str = ""

    @property
    def _whole(self) -> Any:
        holder = self.holders[0]
        return holder[self.key] if isinstance(holder, dict) else getattr(holder, self.key)

    @property
    def value(self) -> Any:
        """What it is now."""
        return getattr(self._whole, self.field) if self.field else self._whole

    def set(self, value: Any) -> None:
        """Change it, for steps that are recorded from now on."""
        whole = replace(self._whole, **{self.field: value}) if self.field else value
        for holder in self.holders:
            if isinstance(holder, dict):
                holder[self.key] = whole
            else:
                setattr(holder, self.key, whole)


def tile_constants(name: str, holder: Any, key: Any) -> Iterator[Constant]:
    """Those of a `Tile`."""
    for each in fields(Tile):
        yield Constant(f"{name}.{each.name}", (holder,), key, TILES[each.name], each.name)


def numbers(module: Any, **values: tuple[int, ...]) -> Iterator[Constant]:
    """Those of a module that have names of their own."""
    for name, each in values.items():
        yield Constant(name, (module,), name, each)


def constants(form: str) -> list[Constant]:
    """Those that the step of few rows has, for weights held so."""
    found = [
        Constant("kda_block", (DecodeStep,), "kda_block", (32, 64, 128)),
        Constant("kda_warps", (DecodeStep,), "kda_warps", (4, 8, 16)),
        *numbers(step, ATTEND_TOKENS=(16, 32, 64), LARGE_ATTEND_WARPS=(4, 8), ATTEND_STAGES=(2, 3)),
        *numbers(step, SPLITS=(66, 132, 264)),
        *numbers(few_rows, MIX_BLOCK=(32, 64, 128), MIX_GROUP=(16, 32, 64), MIX_WARPS=(4, 8, 16)),
    ]
    weights = quantization(form)
    if weights is None:
        tile, inside = (24 << 10, 32 << 10, 40 << 10), (32 << 10, 40 << 10, 56 << 10)
        found += numbers(few_rows, TILE_BYTES=tile, IN_BYTES=inside, PROGRAMS=(96, 128, 264))
        return found
    found += numbers(many_rows, NORM_WARPS=(8, 16, 32))
    found += numbers(packed_few_rows, SCORE_BLOCK=(2, 4, 8), SCORE_WARPS=(2, 4, 8))
    dense, experts = weights.schemes["attention"], weights.schemes["experts"]
    if dense is not None:
        key = "FLOAT8" if dense.is_float else "INTEGERS"
        found += tile_constants("dense", fixed_point, key)
        found += numbers(packed_few_rows, MAX_SPLITS=(4, 8, 16))
        found += numbers(fixed_point, PROGRAMS=(264, 528, 792))
    if experts is not None:
        found += tile_constants("experts in", packed_few_rows.EXPERTS_IN, experts.bits)
        found += tile_constants("experts out", packed_few_rows.EXPERTS_OUT, experts.bits)
    return found


class Steps:
    """Steps of one model.

    Args:
        model: On a GPU.
        config: The model's.
        rows: Of the cache.
    """

    def __init__(self, model: Any, config: KimiLinearConfig, rows: int) -> None:
        self.model, self.config = model, config
        generator = torch.Generator().manual_seed(0)
        shape = STEPS + WARM_UP, rows, PROMPT
        self.ids = torch.randint(config.vocab_size, shape, generator=generator).to(DEVICE)

    @torch.no_grad()
    def run(self) -> tuple[float, Tensor]:
        """Milliseconds of a step, recorded anew, and the first step's logits."""
        drop_recordings(self.model)
        gc.collect()
        torch.cuda.empty_cache()
        times = []
        for _ in range(REPEATS):
            cache = new_cache("ours", self.config, PROMPT + len(self.ids))
            self.model(self.ids[0], cache=cache, use_cache=True, logits_to_keep=1)
            logits = self._step(cache, 0)
            for i in range(1, WARM_UP):
                self._step(cache, i)
            synchronise(DEVICE)
            start = time.perf_counter()
            for i in range(STEPS):
                self._step(cache, WARM_UP + i)
            synchronise(DEVICE)
            times.append(1e3 * (time.perf_counter() - start) / STEPS)
        return min(times), logits.float()

    def _step(self, cache: Any, i: int) -> Tensor:
        logits: Tensor = self.model(self.ids[i, :, :1], cache=cache, use_cache=True).logits
        return logits


def tune(steps: Steps, every: list[Constant], seconds: float, record: Recorder) -> None:
    """Try all, again and again as long as one was changed and there is time."""
    end = time.monotonic() + seconds
    best, expected = steps.run()
    record.tell({"event": "start", "ms": best, **{each.name: each.value for each in every}})
    is_changed = True
    while is_changed:
        is_changed = False
        for constant in every:
            for value in constant.values:
                before = constant.value
                if value == before or time.monotonic() > end:
                    continue
                constant.set(value)
                line = {"event": "tried", "constant": constant.name, "value": value, "best": best}
                try:
                    ms, logits = steps.run()
                # any kind: what does not fit the chip is a result
                except Exception as error:
                    record.tell(line | {"error": f"{type(error).__name__}: {error}"[:200]})
                    constant.set(before)
                    continue
                difference = float((logits - expected).norm() / expected.norm())
                is_taken = ms < (1 - GAIN) * best and difference < TOLERANCE
                record.tell(line | {"ms": ms, "difference": difference, "is_taken": is_taken})
                if is_taken:
                    best, is_changed = ms, True
                else:
                    constant.set(before)
    record.tell({"event": "end", "ms": best, **{each.name: each.value for each in every}})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--quantize", default=NONE, metavar="FORM", help="of benchmark.py")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--commit", help="in the lines, where git is not there to ask")
    args = parser.parse_args()
    form = args.quantize
    most = (FewRowsStep if quantization(form) is None else PackedFewRowsStep).most_rows
    if not 1 <= args.rows <= most:
        parser.error(f"--rows {args.rows} is not allowed: the step of few rows has 1 to {most}")
    record = Recorder(args.record)
    config = KimiLinearConfig.from_preset("48b-a3b")
    model = build(
        "ours", config, device=DEVICE, dtype=torch.bfloat16, quantization=quantization(form)
    )
    model.decode_backend = "graph"
    record.tell(setting(args.commit) | {"quantize": form, "rows": args.rows})
    tune(Steps(model, config, args.rows), constants(form), args.seconds, record)


if __name__ == "__main__":
    main()
