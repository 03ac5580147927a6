"""The first `generate()` of a process that has just begun: a part of `benchmark.py`.

Takes one JSON object as its argument, prints another one. Imports, weights, the first call and the
third one are timed apart: the first call less the third is what autotuning, compilation and capture
cost, but for the prompt's graph, which the second records.
"""

import json
import sys
import time


def main(
    *,
    kind: str,
    form: str,
    preset: str,
    device: str,
    dtype: str,
    prompt_length: int,
    new_tokens: int,
) -> dict[str, float]:
    """Seconds of each step."""
    times = [time.perf_counter()]
    import torch

    from kimi_linear import KimiLinearConfig
    from measuring.device import synchronise
    from measuring.forms import quantization
    from measuring.models import build

    def lap() -> float:
        synchronise(target)
        times.append(time.perf_counter())
        return times[-1] - times[-2]

    target = torch.device(device)
    figures = {"import_seconds": lap()}
    config = KimiLinearConfig.from_preset(preset)
    model = build(
        kind,
        config,
        device=target,
        dtype=getattr(torch, dtype),
        quantization=quantization(form),
    )
    figures["build_seconds"] = lap()
    ids = torch.randint(0, config.vocab_size, (1, prompt_length)).to(target)
    for name in ("first_call_seconds", "second_call_seconds", "third_call_seconds"):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        figures[name] = lap()
    return figures


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
