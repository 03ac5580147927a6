"""200,000 tokens on a CPU with a small model: memory and time as the context grows.

The model has random weights and every part of the real one: three KDA layers, an MLA layer of one
head, experts. It reads the text in chunks, and decodes a few tokens at every mark. A line gives the
cache's bytes, the process's resident bytes above those before the first chunk, now and at most so
far, and the time per token read and decoded since the mark before. The last line is the verdict:
bytes per token of the cache and of the whole process. glibc is told to hand freed buffers back,
which it would keep for later. Progress goes to stderr.

    python benchmarks/long_context_cpu.py --record benchmarks/results/long_context_cpu.jsonl
    python benchmarks/long_context_cpu.py --num-tokens 8192 --mark-tokens 2048
"""

import ctypes
import gc
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Recorder, make_parser, setting

from kimi_linear import KimiLinearCache, KimiLinearConfig, KimiLinearForCausalLM

ALLOWED_RATIO = 1.5
MALLOPT_MMAP_THRESHOLD = -3
DECODED_TOKENS = 5


def resident_bytes() -> int:
    """Resident size of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hand_freed_memory_back() -> None:
    """Have glibc map every buffer of 128 KiB or more by itself, so that the resident size is what
    is in use; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MALLOPT_MMAP_THRESHOLD, 128 * 1024)


def small_model() -> KimiLinearForCausalLM:
    """Four layers, the last one MLA."""
    torch.manual_seed(0)
    config = KimiLinearConfig.from_preset("2m", num_hidden_layers=4, num_attention_heads=1)
    return KimiLinearForCausalLM(config).eval()


def read_and_decode(
    model: KimiLinearForCausalLM, num_tokens: int, mark_tokens: int, chunk_tokens: int
) -> list[dict[str, Any]]:
    """A result for every mark."""
    config = model.config
    cache, results = KimiLinearCache(config, rollback_tokens=0), []
    generator = torch.Generator().manual_seed(1)

    def read(count: int) -> float:
        ids = torch.randint(0, config.vocab_size, (1, count), generator=generator)
        start = time.perf_counter()
        model(ids, cache=cache, logits_to_keep=1)
        return time.perf_counter() - start

    warm_up = KimiLinearCache(config)
    model(torch.zeros(1, chunk_tokens, dtype=torch.long), cache=warm_up)
    del warm_up
    gc.collect()
    before = resident_bytes()
    for mark in range(mark_tokens, num_tokens + 1, mark_tokens):
        seconds = 0.0
        while cache.get_seq_length() < mark - DECODED_TOKENS:
            seconds += read(min(chunk_tokens, mark - DECODED_TOKENS - cache.get_seq_length()))
        steps = [read(1) for _ in range(mark - cache.get_seq_length())]
        results.append(
            {
                "case": "mark",
                "tokens": mark,
                "cache_bytes": cache.cache_memory(),
                "resident_bytes": resident_bytes() - before,
                "peak_bytes": peak_bytes() - before,
                "read_microseconds_per_token": round(1e6 * seconds / mark_tokens, 1),
                "decode_milliseconds": round(1e3 * statistics.median(steps), 3),
            }
        )
        print(f"{mark} of {num_tokens} tokens", file=sys.stderr, flush=True)
    return results


def verdict(results: list[dict[str, Any]], config: KimiLinearConfig) -> dict[str, Any]:
    """Growth between the first and the last mark, per token."""
    first, last = results[0], results[-1]
    tokens = last["tokens"] - first["tokens"]
    latent = 4 * (config.kv_lora_rank + config.qk_rope_head_dim)
    needed = latent * config.layer_types.count("full_attention")

    def growth(key: str) -> float:
        return round((last[key] - first[key]) / tokens, 1)

    held = last["cache_bytes"]["full_attention"] - first["cache_bytes"]["full_attention"]
    result = {
        "case": "verdict",
        "tokens": last["tokens"],
        "latent_bytes_per_token": needed,
        "cache_bytes_per_token": round(held / tokens, 1),
        "resident_bytes_per_token": growth("resident_bytes"),
        "peak_bytes_per_token": growth("peak_bytes"),
        "fixed_bytes": last["cache_bytes"]["linear_attention"],
    }
    result["passed"] = (
        first["cache_bytes"]["linear_attention"] == result["fixed_bytes"]
        and result["peak_bytes_per_token"] <= ALLOWED_RATIO * needed
    )
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print and record the lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=200_000)
    parser.add_argument("--mark-tokens", type=int, default=20_000)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if not DECODED_TOKENS < args.mark_tokens <= args.num_tokens:
        parser.error(
            f"--mark-tokens={args.mark_tokens} must be above {DECODED_TOKENS} and at most "
            "--num-tokens"
        )
    torch.set_num_threads(args.threads)
    where = setting()
    hand_freed_memory_back()
    model = small_model()
    with torch.inference_mode():
        results = read_and_decode(model, args.num_tokens, args.mark_tokens, args.chunk_tokens)
    tell = Recorder(args.record).tell
    for result in results:
        tell({**result, **where})
    tell(verdict(results, model.config))


if __name__ == "__main__":
    main()
