"""Decoding on several GPUs that have a model together, beside one of them alone.

The first process measures `generate()` of the whole model on its GPU; then all of them build the
model again, divided by tensor parallelism, with the same weights, and measure it layer by layer,
and by the recorded step with each of `parallel/sums.py`'s ways to sum: the group's (NCCL), torch's
operator on symmetric memory, and kernels of ours. A line of JSON for each way and number of rows:
milliseconds a token, tokens per second, the most memory of a GPU, and how many of the new tokens
are those of one GPU, counted up to the first other one of each row.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --preset 48b-a3b \\
        --record benchmarks/results/tensor_parallel.jsonl
"""

import gc
import os
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from common import Recorder, make_parser, setting
from measuring.autotuning import limit_autotuning
from measuring.device import synchronise
from measuring.models import build, build_divided
from torch import Tensor

from kimi_linear import PRESETS, KimiLinearConfig
from kimi_linear.decode.graph import drop_recordings, has_recording, recorded_steps
from kimi_linear.parallel import sums

WARM_UP_TOKENS = 8
WAYS = ("layers", *reversed(sums.WAYS))  # without a recorded step, and its sums


class Decoding:
    """How `generate()` of a model is timed.

    Args:
        device: Of the model.
        vocab_size: Of the prompts' random ids.
        prompt_length: Tokens of each row's prompt.
        repeats: Pairs of runs, of which the median counts.
    """

    def __init__(
        self, device: torch.device, vocab_size: int, prompt_length: int, repeats: int
    ) -> None:
        self.device, self.vocab_size = device, vocab_size
        self.prompt_length, self.repeats = prompt_length, repeats

    def figures(self, model: Any, num_rows: int, count: int) -> tuple[dict[str, Any], Tensor]:
        """Time per token is the difference between runs of 1 + `count` tokens and of one, so that
        the prompt and what is done once per call drop out; and the new tokens [rows, 1 + count]."""
        generator = torch.Generator().manual_seed(num_rows)
        shape = num_rows, self.prompt_length
        prompts = torch.randint(0, self.vocab_size, shape, generator=generator).to(self.device)
        mask = torch.ones_like(prompts)

        def run(new: int) -> tuple[float, Tensor]:
            synchronise(self.device)
            start = time.perf_counter()
            text = model.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)
            synchronise(self.device)
            return time.perf_counter() - start, text

        run(WARM_UP_TOKENS)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        pairs = [(run(1)[0], run(1 + count)) for _ in range(self.repeats)]
        text = pairs[-1][1][1]
        ms = 1e3 * statistics.median(long - short for short, (long, _) in pairs) / count
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        found = {
            "rows": num_rows,
            "new_tokens": count,
            "ms_per_token": ms,
            "tokens_per_second": 1e3 * num_rows / ms,
            "is_recorded": has_recording(model, num_rows),
            "peak_gb": peak / 1e9,
        }
        return found, text[:, self.prompt_length :].cpu()


def same_tokens(found: Tensor, expected: Tensor) -> float:
    """The fraction of tokens before the first other one of each row."""
    return (found == expected).cumprod(dim=1).float().mean().item()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="2m", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--skip-one", action="store_true", help="no run of one GPU alone")
    args = parser.parse_args()
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world = int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast stays off
    limit_autotuning(1)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if is_gpu else torch.float32
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        timeout=timedelta(minutes=8),
        device_id=device if is_gpu else None,
    )
    fields = {} if args.layers is None else {"num_hidden_layers": args.layers}
    config = KimiLinearConfig.from_preset(args.preset, **fields)
    record = Recorder(args.record) if rank == 0 else None
    decoding = Decoding(device, config.vocab_size, args.prompt_length, args.repeats)
    alone: dict[int, Tensor] = {}

    def tell(line: dict[str, Any]) -> None:
        if record is not None:
            record.tell(line)

    tell({**setting(), "preset": args.preset, **fields})
    model: Any
    if rank == 0 and not args.skip_one:
        start = time.monotonic()
        model = build("ours", config, device=device, dtype=dtype)
        tell({"case": "one GPU", "build_seconds": time.monotonic() - start})
        for num_rows in args.rows:
            found, alone[num_rows] = decoding.figures(model, num_rows, args.new_tokens)
            tell({"case": "one GPU", **found})
        del model
        gc.collect()
        if is_gpu:
            torch.cuda.empty_cache()
    dist.barrier()
    start = time.monotonic()
    model = build_divided(config, world, device=device, dtype=dtype)
    if is_gpu:
        torch.cuda.empty_cache()
    tell({"case": f"{world} GPUs", "build_seconds": time.monotonic() - start})
    for way in args.ways:
        model.decode_backend = "eager" if way == "layers" else "graph"
        sums.WAY = way
        count = 8 if way == "layers" else args.new_tokens
        for num_rows in args.rows:
            found, text = decoding.figures(model, num_rows, count)
            if num_rows in alone:
                found["same_tokens"] = same_tokens(text, alone[num_rows][:, : 1 + count])
            steps = recorded_steps(model)[-1:]  # without shared memory the group sums after all
            found["sums"] = [type(getattr(x, "sum", None) or x.meetings).__name__ for x in steps]
            tell({"case": f"{world} GPUs, {way}", **found})
        drop_recordings(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
