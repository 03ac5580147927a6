"""What training's loss and experts take on one GPU, piece by piece: time and memory.

The loss of hidden states and a head: from logits, by chunks, and by FLA's fused linear cross
entropy. One layer of experts: by Transformers' "grouped_mm" and by ours. A whole step of a packed
row: with logits and Transformers' experts, with each of ours alone, with both. Forward and backward
in bfloat16, median of five; a line of JSON each. `scripts/benchmark.py` has the native model too.

    python benchmarks/training_gpu.py --preset 1b-a0.3b --record benchmarks/results/training.jsonl
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Recorder, make_parser, setting
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops import experts as experts_kimi_linear
from kimi_linear.ops.cross_entropy import linear_cross_entropy
from kimi_linear.ops.experts.training import train_experts

RUNS = 5


def measure(loss_of: Callable[[], Tensor], parameters: list[Tensor]) -> dict[str, Any]:
    """Median time of a forward and a backward pass, and the peak above what is there before."""

    def step() -> float:
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss_of().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        step()
    for parameter in parameters:
        parameter.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step() for _ in range(RUNS))
    peak = torch.cuda.max_memory_allocated() - before
    return {"milliseconds": round(1e3 * seconds, 2), "peak_megabytes": round(peak / 1e6)}


def losses(config: KimiLinearConfig, num_tokens: int) -> dict[str, Any]:
    x = torch.randn(num_tokens, config.hidden_size, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(config.vocab_size, config.hidden_size, device="cuda") * 0.02
    weight = weight.bfloat16().requires_grad_()
    labels = torch.randint(0, config.vocab_size, (num_tokens,), device="cuda")
    functions: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: F.cross_entropy(F.linear(x, weight).float(), labels),
        "chunks": lambda: linear_cross_entropy(x, weight, labels),
    }
    try:
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss as fla

        functions["fla"] = lambda: fla(x, labels, weight)
        functions["fla_16_bits"] = lambda: fla(x, labels, weight, accumulate_grad_in_fp32=False)
    except ImportError:
        pass
    return {name: measure(function, [x, weight]) for name, function in functions.items()}


def experts(config: KimiLinearConfig, num_tokens: int) -> dict[str, Any]:
    layer = KimiLinearExperts(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer = layer.to("cuda", torch.bfloat16)
    x = torch.randn(num_tokens, config.hidden_size, device="cuda").bfloat16().requires_grad_()
    scores = torch.rand(num_tokens, config.num_experts, device="cuda")
    weights, index = scores.topk(config.num_experts_per_token)
    weights.requires_grad_()
    functions = {"grouped_mm": ALL_EXPERTS_FUNCTIONS["grouped_mm"], "ours": train_experts}
    parameters = [x, weights, *layer.parameters()]
    return {
        name: measure(lambda f=function: f(layer, x, index, weights).float().mean(), parameters)
        for name, function in functions.items()
    }


def steps(config: KimiLinearConfig, num_tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config).to("cuda", torch.bfloat16).train()
    ids = torch.randint(0, config.vocab_size, (1, num_tokens), device="cuda")
    half, quarter, eighth = num_tokens // 2, num_tokens // 4, num_tokens // 8
    lengths = [half, quarter, eighth, num_tokens - half - quarter - eighth]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    is_lean, figures = experts_kimi_linear.trains_lean, {}
    for name, backend, lean in (
        ("neither", "logits", False),
        ("loss", "fused", False),
        ("experts", "logits", True),
        ("both", "fused", True),
    ):
        model.loss_backend = backend
        experts_kimi_linear.trains_lean = is_lean if lean else lambda *args: False
        figures[name] = measure(
            lambda: model(ids, position_ids=positions, labels=ids, use_cache=False).loss,
            list(model.parameters()),
        )
    experts_kimi_linear.trains_lean = is_lean
    return figures


CASES = {"loss": losses, "experts": experts, "step": steps}


def main(*, preset: str, tokens: int, cases: list[str], record: Path | None) -> None:
    config = KimiLinearConfig.from_preset(preset)
    tell = Recorder(record).tell
    tell({"environment": setting()})
    for case in cases:
        figures = CASES[case](config, tokens)
        tell({"case": case, "preset": preset, "tokens": tokens, **figures})


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="1b-a0.3b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    main(**vars(parser.parse_args()))
