"""Kernels that do in one launch what others do in several: each way against the layers."""

import copy

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, check, decode_model, prepared, small_grids  # noqa: F401
from launches import launches_of_a_step, layer_plan_model
from packed_models import every_part

from kimi_linear import KimiLinearCache
from kimi_linear.decode import delta_rule, router
from kimi_linear.quantization.packing import pack_rest
from kimi_linear.schemes import Scheme

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


def packed(model):
    pack_rest(model, every_part(Scheme(4, 32), Scheme(8, None)))
    return model


@pytest.mark.parametrize("norm_rows", [0, 4])
@pytest.mark.parametrize("choice", ["launch", "last"])
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_experts_of_packed_models(num_rows, choice, norm_rows, device, monkeypatch):
    """Behind attention, whose parts are added with the norm."""
    monkeypatch.setattr(router, "CHOICE", choice)
    monkeypatch.setattr(router, "NORM_ROWS", norm_rows)
    sizes = {"hidden_size": 96, "intermediate_size": 96, "moe_intermediate_size": 32}
    model = packed(decode_model(device, **sizes))
    step, cache = prepared(model, num_rows)
    other, ids = cache.copy(), token_ids(num_rows, 1, seed=2).to(model.device)
    model.decode_backend = "eager"
    for _ in range(2):
        step.ids.copy_(ids)
        step.run()
        check(step.logits, model(ids, cache=other).logits[:, 0], excess=10)
    assert not step.router.arrived.any()


@pytest.mark.parametrize("choice", ["launch", "last"])
@pytest.mark.parametrize("is_sigmoid", [True, False], ids=["sigmoid", "softmax"])
@torch.no_grad()
def test_choice_of_experts(is_sigmoid, choice, device, monkeypatch):
    """Of equal scores the first ones, of scores that are not numbers any."""
    monkeypatch.setattr(router, "CHOICE", choice)
    activation = "sigmoid" if is_sigmoid else "softmax"
    fields = {"moe_router_activation_func": activation, "num_experts_per_token": 3}
    model = decode_model(device, num_experts=10, **fields)
    gate = model.model.layers[1].block_sparse_moe.gate
    gate.weight[[2, 7, 8]] = gate.weight[5].clone()
    gate.e_score_correction_bias.zero_()[[2, 5, 7, 8]] = 3.0
    step, _ = prepared(model, 3)
    step.hidden[2] = float("nan")
    step._experts(1)
    assert step.experts[:2].tolist() == [[2, 5, 7]] * 2
    assert 0 <= int(step.experts.min()) <= int(step.experts.max()) < 10
    assert model.config.moe_renormalize
    expected = torch.full_like(step.weights[:2], model.config.routed_scaling_factor / 3)
    check(step.weights[:2], expected)


# Of a step with the 48B model's layers, plain and packed, by KDA_IN_ONE, CHOICE and NORM_ROWS.
LAUNCHES = {
    (0, "launch", 0): (225, 280),
    (4, "launch", 0): (205, 260),
    (0, "last", 0): (199, 254),
    (0, "launch", 4): (225, 254),
    (4, "last", 4): (179, 208),
}


@torch.no_grad()
def test_number_of_launches(device, monkeypatch):
    model = layer_plan_model(device)
    found = []
    for each in (model, packed(copy.deepcopy(model))):
        for rows_in_one, choice, norm_rows in LAUNCHES:
            monkeypatch.setattr(delta_rule, "KDA_IN_ONE", rows_in_one)
            monkeypatch.setattr(router, "CHOICE", choice)
            monkeypatch.setattr(router, "NORM_ROWS", norm_rows)
            found.append(launches_of_a_step(each).total())
    assert found == [count for counts in zip(*LAUNCHES.values(), strict=True) for count in counts]
