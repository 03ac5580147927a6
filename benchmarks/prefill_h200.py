"""Prefill of the 48B model's shape with random weights on one GPU: speed, memory, exactness.

Each length is read in one call through the public forward: a first call, then the median of three.
With `--reference`, another checkout of this repository is measured in the same run; with
`--exactness`, both are compared with a float32 run of the first layers. `--chunks` reads one long
text in chunks into one cache. A line of JSON each; weights take 98 GB.

    python benchmarks/prefill_h200.py --reference ../before \\
        --record benchmarks/results/prefill_h200.jsonl
    python benchmarks/prefill_h200.py --lengths "" --chunks 1048576
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Recorder, make_parser, setting
from million_tokens import random_model

from kimi_linear import KimiLinearCache
from kimi_linear.ops.kda import fla as kda

EXACTNESS_LAYERS, EXACTNESS_TOKENS = 4, 20000


def seconds(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: Any, num_tokens: int) -> dict[str, Any]:
    """One length in one call."""
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(0, model.config.vocab_size, (1, num_tokens), device="cuda")

    def read() -> None:
        assert bool(model(ids, logits_to_keep=1).logits.isfinite().all())

    first = seconds(read)
    torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(read) for _ in range(3))
    return {
        "case": "prefill",
        "tokens": num_tokens,
        "first_seconds": round(first, 2),
        "milliseconds": round(1e3 * median, 1),
        "tokens_per_second": round(num_tokens / median),
        "peak_bytes_above_weights": torch.cuda.max_memory_allocated() - weights,
    }


def measure_chunks(model: Any, num_tokens: int, chunk: int, tell: Callable[[dict], None]) -> None:
    """One long text in chunks; a line at every eighth."""
    weights = torch.cuda.memory_allocated()
    cache = KimiLinearCache(model.config, rollback_tokens=0, reserve_tokens=num_tokens)
    torch.cuda.reset_peak_memory_stats()
    total, marked = 0.0, 0.0
    for start in range(0, num_tokens, chunk):
        count = min(chunk, num_tokens - start)
        ids = torch.randint(0, model.config.vocab_size, (1, count), device="cuda")
        total += seconds(lambda ids=ids: model(ids, cache=cache, logits_to_keep=1))
        read = start + count
        if read * 8 // num_tokens > start * 8 // num_tokens:
            tell(
                {
                    "case": "chunks",
                    "chunk_tokens": chunk,
                    "tokens": read,
                    "seconds": round(total, 2),
                    "seconds_since_mark": round(total - marked, 2),
                    "peak_bytes_above_weights": torch.cuda.max_memory_allocated() - weights,
                }
            )
            marked = total


def hidden_states(is_wide: bool) -> torch.Tensor:
    """Last hidden states of the model's first layers, in float32 by torch's operators if wide."""
    model = random_model(EXACTNESS_LAYERS)
    if is_wide:
        kda._fla_obstacle = lambda *args: "a float32 run is wanted"
        model = model.float()
        model.set_experts_implementation("eager")
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, EXACTNESS_TOKENS), device="cuda")
    return model.model(ids).last_hidden_state


def run_other(checkout: Path, flags: list[str], tell: Callable[[dict], None]) -> None:
    """Run this script on the package of another checkout and take its lines."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kimi_linear").symlink_to(checkout.resolve())
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, *flags]
        environ = {**os.environ, "PYTHONPATH": path}
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                tell(json.loads(line))


def compare(reference: Path | None, tell: Callable[[dict], None]) -> None:
    """Distances from the float32 run, of both checkouts."""
    runs = {"float32": ROOT, "new": ROOT, **({} if reference is None else {"old": reference})}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, checkout in runs.items():
            file = Path(folder) / name
            run_other(checkout, ["--states", str(file), "--name", name], tell)
            found[name] = torch.load(file)
    wide = found.pop("float32").double()
    line: dict[str, Any] = {"case": "exactness", "tokens": EXACTNESS_TOKENS}
    line["layers"] = EXACTNESS_LAYERS
    for name, states in found.items():
        error = (states.double() - wide).norm(dim=-1) / wide.norm(dim=-1)
        line[name] = {"mean": error.mean().item(), "largest": error.max().item()}
    tell(line)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and record the lines as they come."""
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", default="4096,32768,131072")
    parser.add_argument("--chunks", type=int, default=0, help="length of a text read in chunks")
    parser.add_argument("--chunk-tokens", type=int, default=32768)
    parser.add_argument("--exactness", action="store_true")
    parser.add_argument("--reference", type=Path, help="another checkout to measure")
    parser.add_argument("--reference-commit", default="unknown")
    parser.add_argument("--name", default="new", help="what the lines call this checkout")
    parser.add_argument("--commit", help="where there is no history to ask")
    parser.add_argument("--states", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    write, where = Recorder(args.record).tell, setting(args.commit)

    def tell(line: dict[str, Any]) -> None:
        write({"name": args.name, **line, **({} if "gpu" in line else where)})

    with torch.inference_mode():
        if args.states:
            torch.save(hidden_states(args.name == "float32").cpu(), args.states)
            return
        if args.exactness:
            compare(args.reference, tell)
        if args.reference is not None and args.lengths:
            flags = ["--name", "old", "--lengths", args.lengths]
            run_other(args.reference, [*flags, "--commit", args.reference_commit], tell)
        if not args.lengths and not args.chunks:
            return
        model = random_model(None)
        for length in filter(None, args.lengths.split(",")):
            tell(measure(model, int(length)))
            torch.cuda.empty_cache()
        if args.chunks:
            measure_chunks(model, args.chunks, args.chunk_tokens, tell)


if __name__ == "__main__":
    main()
