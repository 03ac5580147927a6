"""One million tokens on one GPU: the 48B model's shape, random weights, prefill and decode.

The text is read in chunks into one cache, and a few tokens are decoded at every mark. A line gives
the tokens read so far, the speed since the mark before, the time of a decoded token, the cache's
bytes and the GPU's memory: at most so far, and that above the weights. The last line is the
verdict. A run of the full length takes several minutes on an H200; weights take 98 GB.

    python benchmarks/million_tokens.py --record benchmarks/results/million_tokens.jsonl
    python benchmarks/million_tokens.py --num-tokens 131072 --num-layers 8
"""

import statistics
import sys
import time
from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.models import build

from kimi_linear import KimiLinearCache, KimiLinearConfig, KimiLinearForCausalLM

DECODED_TOKENS = 8


def random_model(num_layers: int | None) -> KimiLinearForCausalLM:
    """The 48B model, or its first layers, with random weights made on the GPU."""
    config = KimiLinearConfig.from_preset("48b-a3b")
    if num_layers is not None:
        linear = dict(config.linear_attn_config)
        for kind in ("full_attn_layers", "kda_layers"):
            linear[kind] = [layer for layer in linear[kind] if layer <= num_layers]
        config = KimiLinearConfig.from_preset(
            "48b-a3b", num_hidden_layers=num_layers, linear_attn_config=linear
        )
    return build("ours", config, device=torch.device("cuda"), dtype=torch.bfloat16)


class Run:
    """A text that grows, and what it costs."""

    def __init__(self, model: KimiLinearForCausalLM, num_tokens: int) -> None:
        self.model = model
        self.cache = KimiLinearCache(
            model.config, rollback_tokens=0, reserve_tokens=num_tokens + DECODED_TOKENS
        )
        self.weights = torch.cuda.memory_allocated()

    def read(self, count: int) -> float:
        """Seconds for `count` more tokens."""
        ids = torch.randint(0, self.model.config.vocab_size, (1, count), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = self.model(ids, cache=self.cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if not bool(out.isfinite().all()):
            raise ValueError(f"logits are not finite at token {self.cache.get_seq_length()}")
        return seconds

    def mark(self, tokens: int, chunk_tokens: int) -> dict[str, Any]:
        """Read up to `tokens`, the last few one by one."""
        start, seconds = self.cache.get_seq_length(), 0.0
        target = tokens - DECODED_TOKENS
        while self.cache.get_seq_length() < target:
            seconds += self.read(min(chunk_tokens, target - self.cache.get_seq_length()))
        steps = [self.read(1) for _ in range(DECODED_TOKENS)]
        peak = torch.cuda.max_memory_allocated()
        return {
            "case": "mark",
            "tokens": tokens,
            "prefill_tokens_per_second": round((target - start) / seconds),
            "decode_milliseconds": round(1e3 * statistics.median(steps), 2),
            "cache_bytes": self.cache.cache_memory(),
            "peak_bytes": peak,
            "peak_bytes_above_weights": peak - self.weights,
        }


def main(argv: list[str] | None = None) -> None:
    """Measure, print and record the lines as they come."""
    parser = make_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=1 << 20)
    parser.add_argument("--mark-tokens", type=int, default=1 << 17)
    parser.add_argument("--chunk-tokens", type=int, default=16384)
    parser.add_argument("--num-layers", type=int, help="only so many layers, for a smaller GPU")
    args = parser.parse_args(argv)
    where, tell = setting(), Recorder(args.record).tell

    start = time.perf_counter()
    model = random_model(args.num_layers)
    with torch.inference_mode():
        warm_up = KimiLinearCache(model.config, rollback_tokens=0)
        for count in (args.chunk_tokens, args.chunk_tokens, 1, 1):
            ids = torch.zeros(1, count, dtype=torch.long, device="cuda")
            model(ids, cache=warm_up, logits_to_keep=1)
        del warm_up
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = Run(model, args.num_tokens)
        tell(
            {
                "case": "ready",
                "seconds": round(time.perf_counter() - start, 1),
                "num_layers": model.config.num_hidden_layers,
                "parameters": sum(p.numel() for p in model.parameters()),
                "weight_bytes": run.weights,
                "chunk_tokens": args.chunk_tokens,
                **where,
            }
        )
        results, start = [], time.perf_counter()
        for tokens in range(args.mark_tokens, args.num_tokens + 1, args.mark_tokens):
            results.append(run.mark(tokens, args.chunk_tokens))
            tell({**results[-1], **where})
            print(f"{tokens} of {args.num_tokens} tokens", file=sys.stderr, flush=True)
    first, last = results[0], results[-1]
    tell(
        {
            "case": "verdict",
            "tokens": last["tokens"],
            "seconds": round(time.perf_counter() - start, 1),
            "decode_milliseconds": last["decode_milliseconds"],
            "peak_bytes": last["peak_bytes"],
            # all room for latents is made at the first token: what grows after it is not the cache
            "peak_growth_bytes": last["peak_bytes"] - first["peak_bytes"],
            "passed": last["tokens"] == args.num_tokens,
        }
    )


if __name__ == "__main__":
    main()
