"""Where the time of many requests goes: readings, steps, and the host between them.

The workload is that of `scripts/benchmark.py --measure requests`, once as it is and once with a
wait for the device around every reading and step, so that each has its own time. A line of JSON for
each run: seconds; of the second also all readings (texts, tokens, milliseconds), steps by their
recorded rows (how many, milliseconds), and rows that decoded on average.

    python benchmarks/requests_parts.py --preset 48b-a3b --rows 64 \\
        --record benchmarks/results/requests_parts.jsonl
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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


class Parts:
    """What readings and steps take, one by one."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what ran so far."""
        self.readings: list[list[float]] = []
        self.steps: dict[int, list[float]] = defaultdict(list)
        self.admitted = self.num_rows = 0.0

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of a call by itself, and what it returns."""
        synchronise(DEVICE)
        start = time.perf_counter()
        out = call()
        synchronise(DEVICE)
        return 1e3 * (time.perf_counter() - start), out

    def figures(self) -> dict[str, Any]:
        steps = {rows: [len(ms), round(sum(ms) / len(ms), 3)] for rows, ms in self.steps.items()}
        count = sum(map(len, self.steps.values()))
        return {
            "reading_seconds": sum(each[2] for each in self.readings) / 1e3,
            "admitting_seconds": self.admitted / 1e3,
            "step_seconds": sum(map(sum, self.steps.values())) / 1e3,
            "steps": count,
            "mean_rows": self.num_rows / max(1, count),
            "steps_by_rows": dict(sorted(steps.items())),
            "readings": self.readings,
        }


@contextmanager
def watched(parts: Parts) -> Iterator[None]:
    """Time what runs meanwhile."""
    read, add = Reading.read, [place.add for place in PLACES]
    step = [place.step for place in PLACES]

    def timed_read(self: Any) -> None:
        before = self._done
        ms, _ = parts.timed(lambda: read(self))
        parts.readings.append([len(self.texts), self._done - before, round(ms, 2)])

    def timed_add(i: int) -> Any:
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            ms, row = parts.timed(lambda: add[i](self, *args, **kwargs))
            parts.admitted += ms
            return row

        return timed

    def timed_step(i: int) -> Any:
        def timed(self: Any, rows: list[int], ids: Any) -> Any:
            ms, out = parts.timed(lambda: step[i](self, rows, ids))
            parts.steps[power_of_two(len(rows))].append(ms)
            parts.num_rows += len(rows)
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
    record.tell({"case": "as it is", **requests.requests(args.rows)})
    parts, figures, answers = Parts(), [], requests._answers

    def answered(manager: Any, asked: list[Any]) -> None:
        parts.clear()
        answers(manager, asked)
        figures.append(parts.figures())

    requests._answers = answered  # type: ignore[method-assign]
    with watched(parts):
        found = requests.requests(args.rows)
    # of the last call, which is the workload
    record.tell({"case": "one by one", "seconds": found["seconds"], **figures[-1]})


if __name__ == "__main__":
    main()
