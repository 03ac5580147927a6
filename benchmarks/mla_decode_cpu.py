"""One decoding step of one MLA layer on a CPU: this package against Transformers' own class.

The attention module of both, with the released 48B model's sizes and random weights, reads one
token after a cache of random latents. Every line is the best of the repeats, and their median,
after a warm-up.
"read" is a plain sum over as many latents: what the memory allows. Prints one JSON object a line;
the last one is the verdict. Progress goes to stderr.

    python benchmarks/mla_decode_cpu.py --record benchmarks/results/mla_decode_cpu.jsonl
    python benchmarks/mla_decode_cpu.py --contexts 1024 4096 --native-contexts 4096 --repeats 3
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import Recorder, make_parser, setting
from transformers.models.kimi_linear import KimiLinearConfig as NativeConfig
from transformers.models.kimi_linear import modeling_kimi_linear as native

from kimi_linear import KimiLinearConfig
from kimi_linear.cache.hybrid import KimiLinearCache
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.layers.latent_attention import KimiLinearLatentAttention
from kimi_linear.layers.plan import ForwardPlan

SPEED_TARGET = 50.0
CHECKED_CONTEXT = 16384
LAYER = 3  # the first MLA layer of the released model


def configs() -> tuple[KimiLinearConfig, NativeConfig]:
    """Ours and the native one, of the 48B model's sizes."""
    ours = KimiLinearConfig.from_preset("48b-a3b")
    ours._attn_implementation = "sdpa"
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "kv_lora_rank")
    fields += ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    fields += ("num_hidden_layers",)
    theirs = NativeConfig(
        **{name: getattr(ours, name) for name in fields},
        linear_attn_config=dict(ours.linear_attn_config),
    )
    theirs._attn_implementation = "sdpa"
    return ours, theirs


def ours_step(config: KimiLinearConfig, latent: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """One step of ours; the token is taken back after it."""
    layer = KimiLinearLatentAttention(config, LAYER).eval()
    cache = KimiLinearCache(config, reserve_tokens=latent.shape[1] + 256)
    cache.layers[LAYER].update(latent)
    plan = ForwardPlan(SequenceLayout(), cache, "latents", pieces=[])  # pieces are KDA's

    def step() -> torch.Tensor:
        out = layer(x, plan)[0]
        cache.layers[LAYER].crop(-1)
        return out

    return step


def native_step(config: NativeConfig, latent: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """One step of the native class; the token is taken back after it."""
    layer = native.KimiLinearAttention(config, LAYER).eval()
    cache = transformers.DynamicCache(config=config)
    rank = config.kv_lora_rank
    latent = latent.unsqueeze(1)
    cache.update(latent[..., :rank].clone(), latent[..., rank:].clone(), LAYER)

    def step() -> torch.Tensor:
        out = layer(x, attention_mask=None, cache=cache)[0]
        cache.layers[LAYER].crop(-1)
        return out

    return step


def measure(name: str, context: int, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of one case."""
    ours, theirs = configs()
    torch.manual_seed(0)
    latent = torch.randn(1, context, ours.kv_lora_rank + ours.qk_rope_head_dim).to(dtype)
    x = torch.randn(1, 1, ours.hidden_size).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        if name == "read":
            step: Callable[[], Any] = latent.sum
        else:
            step = ours_step(ours, latent, x) if name == "ours" else native_step(theirs, latent, x)
    finally:
        torch.set_default_dtype(torch.float32)
    seconds = []
    with torch.inference_mode():
        step()
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return {
        "case": name,
        "context": context,
        "seconds": round(min(seconds), 6),
        "median_seconds": round(statistics.median(seconds), 6),
        "repeats": repeats,
        "latent_bytes": latent.numel() * latent.element_size(),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure every case, print and record the lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--native-contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--native-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    cases = [("read", n, args.repeats) for n in args.contexts]
    cases += [("ours", n, args.repeats) for n in args.contexts]
    cases += [("native", n, args.native_repeats) for n in args.native_contexts]
    where, found = {"dtype": args.dtype, **setting()}, {}
    tell = Recorder(args.record).tell
    for number, (name, context, repeats) in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {name} {context} ...", file=sys.stderr, flush=True)
        result = measure(name, context, repeats, dtype)
        found[name, context] = result
        tell({**result, **where})
    tell(verdict(found, args.contexts, args.native_contexts))


def verdict(
    found: dict[tuple[str, int], dict[str, Any]], contexts: list[int], native_contexts: list[int]
) -> dict[str, Any]:
    """Speed-ups, and the cost of one more cached token beside that of reading its latent."""
    result: dict[str, Any] = {"case": "verdict"}
    for context in native_contexts:
        if context in contexts:
            ratio = found["native", context]["seconds"] / found["ours", context]["seconds"]
            result[f"speedup_at_{context}"] = round(ratio, 1)
    if len(contexts) > 1:
        first, last = min(contexts), max(contexts)
        for name in ("ours", "read"):
            more = found[name, last]["seconds"] - found[name, first]["seconds"]
            result[f"{name}_nanoseconds_per_cached_token"] = round(1e9 * more / (last - first), 1)
    if f"speedup_at_{CHECKED_CONTEXT}" in result:
        result["passed"] = result[f"speedup_at_{CHECKED_CONTEXT}"] >= SPEED_TARGET
    return result


if __name__ == "__main__":
    main()
