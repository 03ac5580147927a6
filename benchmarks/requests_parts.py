"""Where the device's time goes with many requests: readings, what is admitted, steps, and the rest.

The workload is that of `scripts/benchmark.py --measure requests`. On a GPU the parts are times
between events of its queue, which nobody waits for meanwhile: the part of a reading has what the
device waits for the host that launches it, too. A line of JSON: the figures of that measurement;
seconds of all parts; all readings (texts, tokens, milliseconds), steps by their recorded rows (how
many, milliseconds), and rows that decoded on average.

    python benchmarks/requests_parts.py --preset 48b-a3b --rows 64 \\
        --record benchmarks/results/requests_parts.jsonl
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.bench import Bench, Effort
from measuring.device import measure_rates, synchronise
from measuring.limits import Limits
from measuring.models import build
from measuring.requests import Requests, Workload

from kimi_linear import PRESETS, KimiLinearConfig
from kimi_linear.generation.reading import Reading
from kimi_linear.generation.texts import OwnCaches, PooledTexts
from kimi_linear.ops.runtime import power_of_two

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACES: Any = (PooledTexts, OwnCaches)


class Mark:
    """A place in what the device does."""

    def __init__(self) -> None:
        self.seconds, self._event = time.perf_counter(), None
        if DEVICE.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def until(self, end: "Mark") -> float:
        """Milliseconds to a later one."""
        if self._event is None:
            return 1e3 * (end.seconds - self.seconds)
        return float(self._event.elapsed_time(end._event))


class Parts:
    """What readings, admissions and steps take, each with its beginning and its end."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what ran so far."""
        self.readings: list[tuple[int, int, Mark, Mark]] = []
        self.admissions: list[tuple[Mark, Mark]] = []
        self.steps: list[tuple[int, Mark, Mark]] = []

    def figures(self, seconds: float) -> dict[str, Any]:
        """All of it, in a run of so many seconds."""
        synchronise(DEVICE)
        readings = [
            (texts, count, round(start.until(end), 2)) for texts, count, start, end in self.readings
        ]
        by_rows: dict[int, list[float]] = defaultdict(list)
        for rows, start, end in self.steps:
            by_rows[power_of_two(rows)].append(start.until(end))
        parts = {
            "reading_seconds": sum(ms for _, _, ms in readings) / 1e3,
            "admitting_seconds": sum(start.until(end) for start, end in self.admissions) / 1e3,
            "step_seconds": sum(map(sum, by_rows.values())) / 1e3,
        }
        steps = {n: [len(ms), round(sum(ms) / len(ms), 3)] for n, ms in sorted(by_rows.items())}
        return {
            **parts,
            "other_seconds": seconds - sum(parts.values()),
            "steps": len(self.steps),
            "mean_rows": sum(rows for rows, _, _ in self.steps) / max(1, len(self.steps)),
            "steps_by_rows": steps,
            "readings": readings,
        }


@contextmanager
def watched(parts: Parts) -> Iterator[None]:
    """Time what runs meanwhile."""
    read, add = Reading.read, [place.add for place in PLACES]
    step = [place.step for place in PLACES]

    def timed_read(self: Any) -> None:
        before, start = self._done, Mark()
        read(self)
        parts.readings.append((len(self.texts), self._done - before, start, Mark()))

    def timed_add(i: int) -> Any:
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = Mark()
            row = add[i](self, *args, **kwargs)
            parts.admissions.append((start, Mark()))
            return row

        return timed

    def timed_step(i: int) -> Any:
        def timed(self: Any, rows: list[int], ids: Any) -> Any:
            start = Mark()
            out = step[i](self, rows, ids)
            parts.steps.append((len(rows), start, Mark()))
            return out

        return timed

    Reading.read = timed_read  # type: ignore[method-assign]
    for i, place in enumerate(PLACES):
        place.add, place.step = timed_add(i), timed_step(i)
    try:
        yield
    finally:
        Reading.read = read  # type: ignore[method-assign]
        for i, place in enumerate(PLACES):
            place.add, place.step = add[i], step[i]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="2m", choices=PRESETS)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--longest-prompt", type=int, default=2048)
    parser.add_argument("--longest-answer", type=int, default=512)
    args = parser.parse_args()
    record = Recorder(args.record)
    record.tell(setting())
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    config = KimiLinearConfig.from_preset(args.preset)
    model = build("ours", config, device=DEVICE, dtype=dtype)
    limits = Limits.of(config, dtype, measure_rates(DEVICE, dtype), None)
    bench = Bench("ours", model, limits, Effort(repeats=1, new_tokens=32))
    workload = Workload(args.requests, (64, args.longest_prompt), (16, args.longest_answer))
    requests = Requests(bench, workload)
    parts, answers = Parts(), requests._answers
    figures: dict[str, Any] = {}

    def answered(manager: Any, asked: list[Any]) -> None:
        parts.clear()
        start = time.perf_counter()
        answers(manager, asked)
        figures.update(parts.figures(time.perf_counter() - start))  # the workload's come last

    requests._answers = answered  # type: ignore[method-assign]
    with watched(parts):
        record.tell({"case": "parts", **requests.requests(args.rows), **figures})


if __name__ == "__main__":
    main()
