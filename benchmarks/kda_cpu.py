"""KDA on the CPU, this package against Transformers' torch fallback: the operation alone, and in a
whole model of one layer with the same weights.

Every measurement runs in a process of its own: seconds (best of the repeats, after one warm-up
where the call is short) and extra memory (growth of the peak resident size over that before the
call, from getrusage; on Linux in KiB). Prints one JSON object a line; the last one is the verdict.
Progress goes to stderr.

    python benchmarks/kda_cpu.py --record benchmarks/results/kda_cpu.jsonl
    python benchmarks/kda_cpu.py --num-tokens 512 --repeats 3
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.models import build as build_model

CASES = (
    "ours_forward",
    "native_forward",
    "ours_model",
    "native_model",
    "ours_forward_backward",
    "ours_decode",
)
NATIVE_CALLS = 3
SPEED_TARGET = 30.0
MEMORY_TARGET = 0.1
TRAINING_TARGET_BYTES = 2 * 10**9


def peak_bytes() -> int:
    """Peak resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_inputs(num_tokens: int, num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Raw inputs of one layer, batch 1, float32."""
    torch.manual_seed(0)
    shape = (1, num_tokens, num_heads, head_dim)
    return {
        "q": torch.randn(shape),
        "k": torch.randn(shape),
        "v": torch.randn(shape),
        "g": torch.randn(shape) - 2,
        "beta": torch.randn(shape[:3]),
        "A_log": torch.rand(num_heads),
        "dt_bias": torch.randn(num_heads * head_dim),
    }


def native_forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Transformers' fallback with the gate in front of it, as its layer calls it."""
    from transformers.models.kimi_linear import modeling_kimi_linear as native

    heads = inputs["g"].shape[2]
    x = inputs["g"] + inputs["dt_bias"].view(heads, -1)
    gate = -inputs["A_log"].view(heads, 1).exp() * torch.nn.functional.softplus(x)
    return native.chunk_kimi_delta_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        g=gate,
        beta=inputs["beta"].sigmoid(),
        use_qk_l2norm_in_kernel=True,
    )[0]


def model_forward(kind: str, num_tokens: int, num_heads: int, head_dim: int) -> Callable[[], Any]:
    """A call of a model of one KDA layer, so narrow that the layer is nearly all of it."""
    from kimi_linear import KimiLinearConfig

    linear = {"num_heads": num_heads, "head_dim": head_dim, "short_conv_kernel_size": 4}
    config = KimiLinearConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        linear_attn_config={**linear, "full_attn_layers": []},
    )
    model = build_model(kind, config, device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(config.vocab_size, (1, num_tokens))
    return lambda: model(ids, use_cache=False)


def build(case: str, num_tokens: int, num_heads: int, head_dim: int) -> Callable[[], Any]:
    """The call to measure, with its inputs made."""
    from kimi_linear.ops.kda import kda_attention

    if case.endswith("_model"):
        return model_forward(case.removesuffix("_model"), num_tokens, num_heads, head_dim)
    if case == "ours_decode":
        inputs = make_inputs(1, num_heads, head_dim)
        state = torch.randn(1, num_heads, head_dim, head_dim)
        return lambda: kda_attention(**inputs, initial_state=state, output_final_state=True)
    inputs = make_inputs(num_tokens, num_heads, head_dim)
    if case == "native_forward":
        return lambda: native_forward(inputs)
    if case == "ours_forward":
        return lambda: kda_attention(**inputs)[0]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    weight = torch.randn_like(inputs["v"])

    def step() -> None:
        out, _ = kda_attention(**leaves)
        torch.autograd.grad(out, list(leaves.values()), weight)

    return step


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case here and now."""
    torch.set_num_threads(args.threads)
    num_tokens = args.training_tokens if case == "ours_forward_backward" else args.num_tokens
    call = build(case, num_tokens, args.num_heads, args.head_dim)
    warm_up = torch.randn(256, 256)
    (warm_up @ warm_up).sum()
    before = peak_bytes()
    seconds = []
    with torch.inference_mode(case != "ours_forward_backward"):
        for _ in range(NATIVE_CALLS if case.startswith("native") else args.repeats + 1):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return {
        "case": case,
        "num_tokens": 1 if case == "ours_decode" else num_tokens,
        "num_heads": args.num_heads,
        "head_dim": args.head_dim,
        "seconds": round(min(seconds), 6),
        "first_seconds": round(seconds[0], 6),
        "extra_bytes": peak_bytes() - before,
        **setting(),
    }


def compare(results: dict[str, dict[str, Any]], check: bool) -> dict[str, Any]:
    """The ratios that count, and whether they are what they should be."""
    verdict: dict[str, Any] = {"case": "verdict"}
    passed = results["ours_forward_backward"]["extra_bytes"] <= TRAINING_TARGET_BYTES
    for what, prefix in (("forward", ""), ("model", "model_")):
        ours, native = results[f"ours_{what}"], results[f"native_{what}"]
        speedup = round(native["seconds"] / ours["seconds"], 1)
        memory = round(ours["extra_bytes"] / native["extra_bytes"], 4)
        verdict[f"{prefix}speedup"] = speedup
        verdict[f"{prefix}speedup_of_first_call"] = round(
            native["first_seconds"] / ours["first_seconds"], 1
        )
        verdict[f"{prefix}memory_ratio"] = memory
        passed = passed and speedup >= SPEED_TARGET and memory <= MEMORY_TARGET
    verdict["training_extra_bytes"] = results["ours_forward_backward"]["extra_bytes"]
    return {**verdict, "passed": passed} if check else verdict


def main(argv: list[str] | None = None) -> None:
    """Measure every case in a fresh process and print the lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens of the forward cases")
    parser.add_argument("--training-tokens", type=int, default=4096)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process")
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(measure(args.case, args)), flush=True)
        return
    arguments = list(sys.argv[1:] if argv is None else argv)
    results, tell = {}, Recorder(args.record).tell
    for number, case in enumerate(CASES, start=1):
        print(f"[{number}/{len(CASES)}] {case} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *arguments, "--case", case]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[case] = json.loads(line.splitlines()[-1])
        tell(results[case])
    standard = (args.num_tokens, args.training_tokens, args.num_heads, args.head_dim)
    tell(compare(results, check=standard == (2048, 4096, 16, 128)))


if __name__ == "__main__":
    main()
