"""The decode step's kernels against the layers that they stand for."""

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, check, decode_model, finish, prepared, small_grids  # noqa: F401

from kimi_linear.decode import many_rows
from kimi_linear.layers.planner import Planner

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.usefixtures("small_grids"),
    pytest.mark.parametrize("device", DEVICES),
]
# few rows take the matrix-vector kernels, many the grouped ones
ROWS = [1, 3, 6]


@pytest.mark.parametrize("index", [0, 1], ids=["kda", "mla"])
@pytest.mark.parametrize("num_rows", ROWS)
@torch.no_grad()
def test_attention_equals_the_layers(num_rows, index, device):
    model = decode_model(device)
    step, cache = prepared(model, num_rows)
    layer, other = model.model.layers[index], cache.copy()
    hidden = step.hidden.clone().to(model.dtype)[:, None]
    step.hidden.copy_(hidden[:, 0])
    branch = step._kda if index == 0 else step._latent
    branch(index)
    out = finish(step) - hidden[:, 0]

    plan = Planner().plan(model.model, hidden, None, other, None)
    expected = layer.self_attn(layer.input_layernorm(hidden), plan)[0][:, 0]
    check(out, expected)
    own, theirs = cache.layers[index], other.layers[index]
    if index == 0:
        check(own.state.recurrent, theirs.state.recurrent, "state")
        check(own.state.conv, theirs.state.conv, "convolution's state")
    else:
        own.count_step(1)
        check(own.segments()[-1], theirs.segments()[-1], "latents")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_shared_experts": 2},
        {"num_shared_experts": 0},
        {"moe_router_activation_func": "softmax"},
        {"moe_renormalize": False},
        {"num_experts": 8, "num_experts_per_token": 3},
    ],
    ids=lambda fields: ",".join(map(str, fields)) or "plain",
)
@pytest.mark.parametrize("num_rows", ROWS)
@torch.no_grad()
def test_experts_equal_the_layers(num_rows, fields, device):
    model = decode_model(device, **fields)
    step, _ = prepared(model, num_rows)
    layer = model.model.layers[1]
    hidden = step.hidden.clone().to(model.dtype)
    step.hidden.copy_(hidden)
    step._experts(1)
    out = finish(step) - hidden
    check(out, layer.block_sparse_moe(layer.post_attention_layernorm(hidden)))


@pytest.mark.parametrize("num_rows", ROWS)
@torch.no_grad()
def test_dense_mlp_equals_the_layers(num_rows, device):
    model = decode_model(device)
    step, _ = prepared(model, num_rows)
    layer = model.model.layers[0]
    hidden = step.hidden.clone().to(model.dtype)
    step.hidden.copy_(hidden)
    step._dense(0)
    out = finish(step) - hidden
    check(out, layer.mlp(layer.post_attention_layernorm(hidden)))


@pytest.mark.parametrize("num_rows", [3, 40])
@torch.no_grad()
def test_all_rows_on_one_expert(num_rows, device):
    """More rows than a group of the grouped kernels holds."""
    model = decode_model(device)
    layer = model.model.layers[1]
    layer.block_sparse_moe.gate.e_score_correction_bias[[1, 4]] += 10
    step, _ = prepared(model, num_rows)
    hidden = step.hidden.clone().to(model.dtype)
    step.hidden.copy_(hidden)
    step._experts(1)
    out = finish(step) - hidden
    assert set(step.experts.flatten().tolist()) == {1, 4}
    check(out, layer.block_sparse_moe(layer.post_attention_layernorm(hidden)))


@pytest.mark.parametrize("is_large", [True, False])
@torch.no_grad()
def test_experts_of_many_rows_in_tiles_of_both_sizes(is_large, device, monkeypatch):
    monkeypatch.setattr(many_rows, "has_large_memory", lambda device: is_large)
    model = decode_model(device)
    layer = model.model.layers[1]
    step, _ = prepared(model, 6)
    hidden = step.hidden.clone().to(model.dtype)
    step.hidden.copy_(hidden)
    step._experts(1)
    out = finish(step) - hidden
    check(out, layer.block_sparse_moe(layer.post_attention_layernorm(hidden)))


@pytest.mark.parametrize("num_rows", [1, 6])
@torch.no_grad()
def test_rows_do_not_see_each_other(num_rows, device):
    """The same row among others gives the same bits."""
    model = decode_model(device)
    results = []
    for seed in range(2):
        step, cache = prepared(model, num_rows)
        torch.manual_seed(seed)
        step.ids.copy_(token_ids(num_rows, 1, seed=seed))
        step.ids[0] = 5
        step.run()
        results.append(step.logits[0].clone())
    assert torch.equal(*results)


@torch.no_grad()
def test_nan_does_not_reach_beyond_the_experts(device):
    """Scores that are not numbers choose some expert, not memory beyond the last one."""
    model = decode_model(device)
    step, _ = prepared(model, 2)
    step.hidden[1] = float("nan")
    step._experts(1)
    assert int(step.experts.min()) >= 0 and int(step.experts.max()) < model.config.num_experts
    assert step.hidden[0].isfinite().all() and step.hidden[1].isnan().all()
