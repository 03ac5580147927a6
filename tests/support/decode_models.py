"""Models whose sizes the decode kernels take, and where those kernels run.

On a GPU they run in bfloat16. Elsewhere they run in float32 under Triton's interpreter, which must
be asked for before triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/decode
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from builders import TWO_LAYERS, tiny_model, token_ids
from tolerance import KERNEL_TOLERANCE, assert_close, assert_kernel_close

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear.decode import few_rows, fixed_point, obstacles, step
from kimi_linear.decode.addresses import prepare
from kimi_linear.decode.recording import StepKind, decode_step
from kimi_linear.layers.moe import KimiLinearRouter

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
)
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED or torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1"
        ),
    ),
]


def decode_model(device: str, seed: int = 0, **fields: Any) -> KimiLinearForCausalLM:
    """A KDA layer with a dense MLP and an MLA layer with experts, unless fields say otherwise."""
    sizes = dict(
        hidden_size=72,  # a power of two and some more
        intermediate_size=56,
        moe_intermediate_size=24,
        **TWO_LAYERS,
        num_attention_heads=3,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
    )
    model = tiny_model(seed=seed, **{**sizes, **fields})
    return model.to("cuda", torch.bfloat16) if device == "cuda" else model


@pytest.fixture
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, which runs program by program: fewer programs, and any device."""
    if INTERPRETED and not torch.cuda.is_available():
        monkeypatch.setattr(few_rows, "PROGRAMS", 4)
        monkeypatch.setattr(fixed_point, "PROGRAMS", 12)
        monkeypatch.setattr(fixed_point, "MIN_BLOCKS", 1)
        monkeypatch.setattr(step, "SPLITS", 6)
        monkeypatch.setattr(obstacles, "DEVICE_TYPES", ("cpu",))
        monkeypatch.setattr(obstacles, "DTYPES", (torch.float32,))


def check(actual, expected, name="", excess=1):
    """`excess`: over float32's tolerance, where no GPU computes."""
    if actual.is_cuda:
        assert_kernel_close(actual, expected, torch.bfloat16, name)
    else:
        assert_close(actual, expected, torch.float32, name, excess)


# Scores of experts that 16 bits cannot tell apart: where the last one that is chosen leads the
# first one that is not by less, each of two ways may choose another.
UNSURE = 0.005


@contextmanager
def choices(model: Any) -> Iterator[list[torch.Tensor]]:
    """A list that takes, of each router that a call runs, by how much each token [N] prefers the
    experts that are chosen."""
    margins: list[torch.Tensor] = []

    def note(router, _, found):
        logits, _, experts = found
        scores = logits.float().sigmoid() + router.e_score_correction_bias.float()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts.long(), True)
        least = scores.masked_fill(~chosen, torch.inf).amin(-1)
        margins.append((least - scores.masked_fill(chosen, -torch.inf).amax(-1)).abs())

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, KimiLinearRouter)
    ]
    try:
        yield margins
    finally:
        for hook in hooks:
            hook.remove()


def check_logits(actual, expected, margins, name="", excess=1):
    """`check` of logits [B, T, V] of the last T tokens, on a GPU without those whose choices of
    `choices` are unsure, unless all are."""
    clear = torch.ones(actual.shape[:2], dtype=torch.bool, device=actual.device)
    if margins:
        num_rows, num_tokens = clear.shape
        margin = torch.stack(margins).amin(0).view(num_rows, -1)[:, -num_tokens:]
        if actual.is_cuda and (margin > UNSURE).any():
            clear = margin > UNSURE
    check(actual[clear], expected[clear], name, excess)


def allowed(model, prompt, found, alone):
    """The answer `alone` to a prompt, or `found` if 16 bits on a GPU cannot tell which token is the
    likeliest where they part."""
    if model.device.type != "cuda" or not found:
        return alone
    text = torch.tensor([[*prompt, *found]], device=model.device)
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    likely = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
    slack = 5 * KERNEL_TOLERANCE[torch.bfloat16] * logits.square().mean().sqrt()
    return found + alone[len(found) :] if (likely > logits.amax(1) - slack).all() else alone


def prepared(model, num_rows, *, num_tokens=9, rollback_tokens=0):
    """A step with random numbers in its residual stream, loaded with a cache, and that cache."""
    cache = KimiLinearCache(model.config, rollback_tokens=rollback_tokens)
    ids = token_ids(num_rows, num_tokens).to(model.device)
    model(ids, cache=cache)
    step = decode_step(model, StepKind(num_rows))
    step.table.copy_(torch.tensor(prepare(cache, num_rows, 1, model.dtype).rows))
    logged = cache.layers[0].rollback.num_logged or 0
    step.counters[:, :2] = torch.tensor([num_tokens, logged])
    step.hidden.copy_(torch.randn(step.hidden.shape))
    return step, cache


def finish(step):
    """The residual stream after a branch, with what many rows have yet to add."""
    added = getattr(step, "to_add", None)
    return step.hidden if added is None else step.hidden + added.float().sum(dim=1)
