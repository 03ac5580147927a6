"""Memory of a process that reads a long text and goes on writing: a part of `benchmark.py`.

Takes one JSON object as its argument, prints others after each step. The allocator may take no more
than a card of a certain size has left beside what CUDA itself needs there. What the driver says of
the whole process is how much less is free than before it began, so nothing else may run meanwhile.
"""

import json
import os
import sys
import time
from typing import Any

# Bytes of cards that forms are meant for: RTX 4090 or 3090, L40S, A100 or H100. The last are sold
# as 80 GB and have more.
CARDS = {"24gb": 24 << 30, "48gb": 48 << 30, **dict.fromkeys(("80gb", "fp8", "fp8w"), 80 * 10**9)}
# Of these, what CUDA's context, kernels and libraries take.
CONTEXT_BYTES = 800 * 10**6
# A text is read in pieces of so many tokens, unless another number is given: of what is there while
# a piece is read, 150 KB a token are its own. The 48B model leaves little of a small card.
CHUNKS, DEFAULT_CHUNK = {"24gb": 4096}, 8192
# What decides how the allocator works; lines tell them.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocator_limit(form: str, gigabytes: float | None) -> int | None:
    """Bytes that the allocator may take: those given, or of the form's card; None: any."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    card = CARDS.get(form.partition("+")[0])
    return None if card is None else card - CONTEXT_BYTES


def default_chunk(form: str) -> int:
    """Tokens of a piece, by the form's card."""
    return CHUNKS.get(form.partition("+")[0], DEFAULT_CHUNK)


def main(
    *,
    kind: str,
    form: str,
    preset: str,
    device: str,
    dtype: str,
    context: int,
    new_tokens: int,
    chunk: int,
    limit_bytes: int | None,
    free_bytes: int | None,
) -> None:
    """Build, read, generate; print figures after each step."""
    import torch

    from kimi_linear import KimiLinearConfig
    from measuring.device import synchronise
    from measuring.forms import quantization
    from measuring.models import build, new_cache
    from measuring.packed import held_bytes

    target = torch.device(device)
    is_cuda = target.type == "cuda"
    if is_cuda and limit_bytes is not None:
        total = torch.cuda.get_device_properties(target).total_memory
        index = torch.cuda.current_device() if target.index is None else target.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), index)
    start = time.perf_counter()

    def tell(step: str, **figures: Any) -> None:
        """Figures of a step, with its seconds and what memory there is."""
        nonlocal start
        synchronise(target)
        seconds = time.perf_counter() - start
        found = {f"{step}_seconds": seconds, **figures}
        if is_cuda:
            found |= _memory(step, free_bytes)
        print(json.dumps(found), flush=True)
        start = time.perf_counter()

    config = KimiLinearConfig.from_preset(preset)
    model = build(
        kind,
        config,
        device=target,
        dtype=getattr(torch, dtype),
        quantization=quantization(form),
    )
    allocator = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}
    tell("build", held_bytes=sum(map(held_bytes, model.parameters())), **allocator)
    generator = torch.Generator().manual_seed(context)
    text = torch.randint(config.vocab_size, (1, context), generator=generator).to(target)
    cache = new_cache(kind, config, context + new_tokens)
    with torch.no_grad():
        for piece in text.split(chunk, dim=1):
            out = model(piece, cache=cache, use_cache=True, logits_to_keep=1)
    chosen = out.logits[:, -1:].argmax(-1)
    tell("prefill", chunk=chunk)
    text = torch.cat([text, chosen], dim=1)
    mask = torch.ones_like(text)
    found = model.generate(
        text, attention_mask=mask, cache=cache, max_new_tokens=new_tokens, do_sample=False
    )
    assert found.shape[1] == context + 1 + new_tokens
    tell("generate", new_tokens=new_tokens)


def _memory(step: str, free_bytes: int | None) -> dict[str, Any]:
    """Of the whole process so far, but for what the step leaves allocated."""
    import torch

    stats = torch.cuda.memory_stats()
    reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    found = {
        f"{step}_allocated_bytes": torch.cuda.memory_allocated(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": peak,
        "retries": stats["num_alloc_retries"],
    }
    if free_bytes is not None:
        now = free_bytes - torch.cuda.mem_get_info()[0]
        # at its peak the allocator may have had more than now
        found |= {"driver_bytes": now, "process_bytes": now - reserved + peak}
    return found


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
