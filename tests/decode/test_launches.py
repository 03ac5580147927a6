"""Kernels that do in one launch what others do in several: each way against the layers."""

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, check, decode_model, prepared, small_grids  # noqa: F401

from kimi_linear import KimiLinearCache
from kimi_linear.decode import delta_rule

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.usefixtures("small_grids"),
    pytest.mark.parametrize("device", DEVICES),
]
# columns of a state that a program has, all of a head's 16 or a share; None: two launches
BLOCKS = [None, 4, 16]


def set_block(monkeypatch, block):
    monkeypatch.setattr(delta_rule, "KDA_IN_ONE", 0 if block is None else 4)
    monkeypatch.setattr(delta_rule, "IN_ONE_BLOCK", block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_delta_rule_of_one_token(num_rows, block, device, monkeypatch):
    set_block(monkeypatch, block)
    model = decode_model(device)
    step, cache = prepared(model, num_rows)
    other, ids = cache.copy(), token_ids(num_rows, 1, seed=2).to(model.device)
    model.decode_backend = "eager"
    for _ in range(2):  # counters are 0 again
        step.ids.copy_(ids)
        step.run()
        check(step.logits, model(ids, cache=other).logits[:, 0])
    own, theirs = cache.layers[0].state, other.layers[0].state
    check(own.recurrent, theirs.recurrent, "state")
    check(own.conv, theirs.conv, "convolution's state")
    assert not step.delta_rule.arrived.any()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rollback_tokens", [0, 8], ids=["kept", "croppable"])
@torch.no_grad()
def test_delta_rule_of_several_tokens(rollback_tokens, block, device, monkeypatch):
    set_block(monkeypatch, block)
    model = decode_model(device)
    caches = [KimiLinearCache(model.config, rollback_tokens=rollback_tokens) for _ in range(2)]
    first = token_ids(1, 7).to(model.device)
    model.decode_backend = "eager"
    for cache in caches:
        model(first, cache=cache)
    for seed, num_tokens in enumerate((3, 1, 2)):
        ids = token_ids(1, num_tokens, seed=seed).to(model.device)
        logits = []
        for cache, backend in zip(caches, ("graph", "eager"), strict=True):
            model.decode_backend = backend
            logits.append(model(ids, cache=cache).logits)
        check(*logits)
    own, theirs = (cache.layers[0] for cache in caches)
    own.settle()
    check(own.state.recurrent, theirs.state.recurrent, "state")
    check(own.state.conv, theirs.state.conv, "convolution's state")
