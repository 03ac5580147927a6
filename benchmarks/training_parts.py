"""Where the time of a training step goes, as `prefill_parts.py` says it of a prompt.

Forward and backward pass of one packed row of random ids, as `benchmark.py --measure train` has it,
or with --lora of adapters on these parts of a frozen model, whose layers are checkpointed. Lines of
JSON: the setting; "step", with the parameters that are trained; then kernels and functions.

    python benchmarks/training_parts.py --preset 1b-a0.3b --tokens 8192 --model native
    python benchmarks/training_parts.py --preset 48b-a3b --tokens 16384 --lora attention shared \\
        --record benchmarks/results/training_parts_h200.jsonl
"""

from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.bench import packed_lengths, packed_step
from measuring.models import MODELS, build
from prefill_parts import DEVICE, tell_parts

from kimi_linear import PRESETS, KimiLinearConfig
from kimi_linear.training.lora import LORA_GROUPS, lora_targets

RANK = 16


def with_adapters(model: Any, groups: list[str]) -> Any:
    """The model, frozen but for new adapters, with checkpoints."""
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = lora_targets(model.config, *groups)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, **targets))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="2m", choices=PRESETS)
    parser.add_argument("--model", default="ours", choices=MODELS)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--lora", nargs="+", choices=LORA_GROUPS, help="parts that have adapters")
    parser.add_argument("--most", type=int, default=40, help="lines of kernels, and of functions")
    parser.add_argument("--commit", help="in the lines, where git is not there to ask")
    args = parser.parse_args()
    if args.lora and args.model != "ours":
        parser.error("--lora is of ours: the parts of the native model have other names")
    config = KimiLinearConfig.from_preset(args.preset)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model: Any = build(args.model, config, device=DEVICE, dtype=dtype)
    model = (with_adapters(model, args.lora) if args.lora else model).train()
    ids = torch.randint(config.vocab_size, (1, args.tokens), device=DEVICE)
    record = Recorder(args.record)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    case = {"model": args.model, "tokens": args.tokens, "lora": args.lora, "trained": trained}
    record.tell(setting(args.commit) | case)
    tell_parts(record, "step", packed_step(model, ids, packed_lengths(args.tokens)), args.most)


if __name__ == "__main__":
    main()
