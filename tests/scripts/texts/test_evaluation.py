"""Bits per byte of whole texts."""

import math

import pytest
import torch
from builders import tiny_model
from learning.optimizers import make_optimizer
from texts.evaluation import bits_per_byte, windows
from torch import nn


def reference_bits(model: nn.Module, ids: list[int], begin: int) -> float:
    """Each token from its whole context, one call per token."""
    bits = 0.0
    for i, target in enumerate(ids):
        logits = model(input_ids=torch.tensor([[begin, *ids[:i]]]), use_cache=False).logits[0, -1]
        bits -= float(logits.double().log_softmax(-1)[target]) / math.log(2)
    return bits


@torch.no_grad()
def test_bits_per_byte_is_the_sum_over_every_token() -> None:
    model = tiny_model()
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 95]]
    expected = sum(reference_bits(model, ids, 94) for ids in texts) / 37
    assert bits_per_byte(model, texts, 37, 94) == pytest.approx(expected, rel=1e-5)
    # batches of other sizes change nothing
    assert bits_per_byte(model, texts, 37, 94, batch_tokens=8) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_long_texts_are_read_in_overlapping_windows() -> None:
    model, ids = tiny_model(), list(range(5, 35))
    found = bits_per_byte(model, [ids], 1, 94, window=12, overlap=4)
    bits, inputs = 0.0, [94, *ids]
    for i, target in enumerate(ids):
        # the context that the window with this token gives it
        start = 0 if i < 12 else (i - 4) // 8 * 8
        logits = model(input_ids=torch.tensor([inputs[start : i + 1]]), use_cache=False).logits
        bits -= float(logits[0, -1].double().log_softmax(-1)[target]) / math.log(2)
    assert found == pytest.approx(bits, rel=1e-5)


def test_windows_score_every_token_once() -> None:
    for count in (1, 7, 8, 9, 12, 13, 40):
        ids = list(range(100, 100 + count))
        scored = [
            token
            for inputs, targets in windows([50, *ids], window=8, overlap=3)
            for token in targets
            if token >= 0 and len(inputs) == len(targets) <= 8
        ]
        assert scored == ids
    with pytest.raises(ValueError, match="overlap=8"):
        list(windows([1, 2, 3], window=8, overlap=8))


def test_a_worse_model_takes_more_bits() -> None:
    model = tiny_model()
    before = bits_per_byte(model, [[5, 6, 7] * 10], 30, 94)
    optimizer = make_optimizer("adamw", model, 1e-2, 0.0)
    for _ in range(10):
        ids = torch.tensor([[94, *[5, 6, 7] * 10]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bits_per_byte(model, [[5, 6, 7] * 10], 30, 94) < 0.7 * before
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(model, [[5]], 0, 94)
