"""Where the time of a prompt goes: the device's kernels, its idle time, and the host's functions.

One forward of a prompt of random ids into an empty cache, as in `generate()`, of the 48B model's
shape with random weights, warm: by a recorded graph, or with --by-layers without one. Lines of
JSON: the setting; "prompt", milliseconds from the call to the device's end, until the call returns
(the host's part), of all kernels one after the other, and in which the device had nothing to do;
"kernel", of each name the calls and milliseconds; "function", of the host's by the time that each
takes itself, under Python's profiler, which makes all of them slower. Without a GPU there are no
kernels, and the host's time has their work in it.

    python benchmarks/prefill_parts.py --preset 48b-a3b --tokens 4096 --quantize fp8 \\
        --record benchmarks/results/prefill_parts_h200.jsonl
"""

import cProfile
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Recorder, make_parser, setting
from measuring.device import synchronise
from measuring.forms import NONE, quantization
from measuring.models import build, new_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kimi_linear import PRESETS, KimiLinearConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP, REPEATS = 3, 8

Line = dict[str, Any]


def wall(call: Callable[[], Any]) -> Line:
    """Medians, by the clock."""
    whole, host = [], []
    for _ in range(REPEATS):
        synchronise(DEVICE)
        start = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - start))
        synchronise(DEVICE)
        whole.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(whole), "host_ms": statistics.median(host)}


def kernels(call: Callable[[], Any]) -> Iterator[tuple[str, float, float]]:
    """Name, beginning and end of each kernel, in microseconds, in the order of their beginnings."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        synchronise(DEVICE)
    events = [each for each in found.events() if each.device_type == DeviceType.CUDA]
    for each in sorted(events, key=lambda event: event.time_range.start):
        yield each.name, each.time_range.start, each.time_range.end


def device_lines(call: Callable[[], Any], most: int) -> tuple[Line, list[Line]]:
    """What all kernels take and leave idle, and those that take most."""
    by_name: dict[str, list[float]] = defaultdict(list)
    idle = end = 0.0
    for name, start, stop in kernels(call):
        by_name[name].append((stop - start) / 1e3)
        idle += max(0.0, start - end) / 1e3 if end else 0.0
        end = max(end, stop)
    lines = [
        {"case": "kernel", "name": name[:120], "calls": len(ms), "ms": sum(ms)}
        for name, ms in by_name.items()
    ]
    lines.sort(key=lambda line: -line["ms"])
    total = {"device_ms": sum(line["ms"] for line in lines), "idle_ms": idle}
    return {**total, "kernels": sum(line["calls"] for line in lines)}, lines[:most]


def host_lines(call: Callable[[], Any], most: int) -> list[Line]:
    """Functions by their own time."""
    profiler = cProfile.Profile()
    synchronise(DEVICE)
    profiler.runcall(call)
    found: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    lines = [
        {"case": "function", "name": place(*where), "calls": calls, "own_ms": 1e3 * own}
        for where, (_, calls, own, _, _) in found.items()
    ]
    return sorted(lines, key=lambda line: -line["own_ms"])[:most]


def place(file: str, line: int, name: str) -> str:
    """A function's name, with the file's last folders where it has one."""
    if not line:
        return name
    path = Path(file)
    short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{short}:{line} {name}"


def tell_parts(record: Recorder, case: str, call: Callable[[], Any], most: int) -> None:
    """Warm up, and tell a call's times, its kernels and its functions."""
    for _ in range(WARM_UP):
        call()
    times = wall(call)
    device, lines = device_lines(call, most) if DEVICE.type == "cuda" else ({}, [])
    record.tell({"case": case, **times, **device})
    for line in lines + host_lines(call, most):
        record.tell(line)


@torch.no_grad()
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="2m", choices=PRESETS)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--quantize", default=NONE, metavar="FORM", help="of benchmark.py")
    parser.add_argument("--by-layers", action="store_true", help="as calls without a graph")
    parser.add_argument("--most", type=int, default=40, help="lines of kernels, and of functions")
    parser.add_argument("--commit", help="in the lines, where git is not there to ask")
    args = parser.parse_args()
    record = Recorder(args.record)
    config = KimiLinearConfig.from_preset(args.preset)
    form = quantization(args.quantize)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model = build("ours", config, device=DEVICE, dtype=dtype, quantization=form).eval()
    ids = torch.randint(config.vocab_size, (1, args.tokens), device=DEVICE)

    model.decode_backend = "eager" if args.by_layers else "auto"

    def call() -> Any:
        cache = new_cache("ours", config, args.tokens, can_crop=False)
        return model(ids, cache=cache, use_cache=True, logits_to_keep=1)

    record.tell(setting(args.commit) | {"quantize": args.quantize, "tokens": args.tokens})
    tell_parts(record, "prompt", call, args.most)


if __name__ == "__main__":
    main()
