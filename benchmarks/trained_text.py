"""Greedy text of a trained model by every path: decode graph, layer by layer, Transformers' model.

A model of a preset's layers learns the source of Python's standard library, byte by byte. Then each
path continues texts that were held out, in bfloat16 and alone in its batch. A line of JSON for each
path says how many bytes of its text are the float32 one's, and where they part how much likelier
the float32 model finds its own byte, in nats: bfloat16 errs by some hundredths.

    python benchmarks/trained_text.py --seconds 100 --prompts 4 --new-bytes 160 \\
        --record benchmarks/results/trained_text_h100.jsonl
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.models import build, official_parts
from texts.corpus import split_by_file, standard_library
from torch import Tensor

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.ops.kda import fla as kda

WINDOW = 8192
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bytes_of(files: Any) -> Tensor:
    return torch.frombuffer(bytearray("\0".join(f.text for f in files).encode()), dtype=torch.uint8)


def train(model: KimiLinearForCausalLM, data: Tensor, seconds: float) -> Iterator[dict[str, Any]]:
    """Steps over windows at random places, for so long."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    start, step, total = time.perf_counter(), 0, 0.0
    while (passed := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = 4e-4 * warm * (0.05 + 0.95 * (1 - passed / seconds))
        place = int(torch.randint(len(data) - WINDOW, (), generator=generator))
        ids = data[place : place + WINDOW].long()[None].to(DEVICE)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, total + loss.detach()
        if step % 100 == 0:
            bits = float(total) / 100 / math.log(2)
            yield {"case": "training", "step": step, "bits_per_byte": round(bits, 3)}
            total = 0.0


def native_like(model: KimiLinearForCausalLM) -> Any:
    """Transformers' model with these weights."""
    native = build("native", model.config, device=DEVICE, dtype=torch.bfloat16)
    weights = {
        official_name: part
        for name, parameter in model.named_parameters()
        for official_name, part in official_parts(name, parameter)
    }
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            for official_name, part in official_parts(name, parameter):
                part.copy_(weights[official_name].view_as(part))
    return native


def texts(model: Any, prompts: list[Tensor], num_new: int) -> list[Tensor]:
    options = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new}
    with torch.inference_mode():
        return [model.generate(prompt, **options)[0] for prompt in prompts]


def gap(model: Any, text: Tensor, other: Tensor, at: int) -> float:
    """How much likelier the model finds the text's byte `at` than the other text's."""
    with torch.inference_mode():
        scores = model(text[None, :at]).logits[0, -1].float()
    return float(scores[text[at]] - scores[other[at]])


def compare(
    wide: Any, prompts: list[Tensor], wanted: list[Tensor], found: list[Tensor]
) -> dict[str, Any]:
    lengths, gaps = [], []
    for prompt, own, other in zip(prompts, wanted, found, strict=True):
        different = (own != other).nonzero().flatten()
        at = int(different[0]) if len(different) else len(own)
        lengths.append(at - prompt.shape[1])
        if len(different):
            gaps.append(round(gap(wide, own, other, at), 4))
    return {"equal_bytes": lengths, "gaps_where_they_part": gaps}


def main(argv: list[str] | None = None) -> None:
    """Train, generate, compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--preset", default="1b-a0.3b")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--commit", help="where there is no history to ask")
    args = parser.parse_args(argv)
    tell = Recorder(args.record).tell
    tell({"case": "setting", **setting(args.commit)})

    kept, held_out = split_by_file(standard_library())
    config = KimiLinearConfig.from_preset(args.preset, vocab_size=256)
    model = build("ours", config, device=DEVICE, dtype=torch.bfloat16).train()
    for line in train(model, bytes_of(kept), args.seconds):
        tell(line)
    model.eval()
    prompts = [bytes_of([file])[: args.prompt_bytes].long()[None].to(DEVICE) for file in held_out]
    prompts = [prompt for prompt in prompts if prompt.shape[1] == args.prompt_bytes][: args.prompts]

    found = {"native": texts(native_like(model), prompts, args.new_bytes)}
    for backend in ("graph", "eager")[DEVICE.type == "cpu" :]:
        model.decode_backend = backend
        found[backend] = texts(model, prompts, args.new_bytes)
    kda._fla_obstacle = lambda *_: "a float32 run is wanted"
    wide = model.float()
    wide.set_experts_implementation("eager")
    wanted = texts(wide, prompts, args.new_bytes)
    for name, each in found.items():
        tell({"case": name, **compare(wide, prompts, wanted, each)})
    if "graph" in found:
        pairs = zip(found["graph"], found["eager"], strict=True)
        same = [bool(torch.equal(a, b)) for a, b in pairs]
        tell({"case": "graph and eager", "same_texts": sum(same), "of": len(same)})


if __name__ == "__main__":
    main()
