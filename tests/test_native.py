"""Against Transformers' own `kimi_linear`, an independent implementation, right in plain cases."""

import pytest
import torch
from builders import tiny_model, token_ids
from native import native_like, native_names
from tolerance import assert_close

pytestmark = [pytest.mark.core, pytest.mark.kernels]

CASES = {
    "hybrid": {},
    "all_kda": {"pattern": "all_kda"},
    "all_mla": {"pattern": "all_mla"},
    "alternating": {"pattern": "alternating"},
    "mla_first": {"pattern": "mla_first"},
    "groups": {"num_expert_group": 3, "topk_group": 2},
    "q_lora": {"q_lora_rank": 10},
    "two_shared": {"num_shared_experts": 2},
    "no_renormalise": {"moe_renormalize": False},
    "two_dense": {"first_k_dense_replace": 2},
}


def our_gradient(model, native_name):
    """Gradient of ours under the native model's parameter name."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return dict(native_names(grads))[native_name]


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    model = tiny_model(**CASES[request.param])
    return model, native_like(model)


def test_logits(pair):
    model, native = pair
    ids = token_ids(2, 83)
    with torch.no_grad():
        assert_close(model(ids).logits, native(ids, use_cache=False).logits, torch.float32)


def test_loss_and_all_gradients(pair):
    model, native = pair
    ids = token_ids(2, 70)
    losses = []
    for each in pair:
        each.zero_grad()
        loss = each.train()(ids, labels=ids, use_cache=False).loss
        loss.backward()
        each.eval()
        losses.append(loss.detach())
    assert_close(losses[0], losses[1], torch.float32)
    checked = 0
    for name, parameter in native.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                our_gradient(model, name), parameter.grad, rtol=1e-4, atol=1e-4, msg=name
            )
            checked += 1
    assert checked == sum(p.grad is not None for p in native.parameters()) > 20


def test_hidden_states_attentions_and_router_logits(pair):
    model, native = pair
    flags = dict(output_hidden_states=True, output_attentions=True, output_router_logits=True)
    ids = token_ids(2, 19)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = model(ids, **flags), native(ids, use_cache=False, **flags)
    for field in ("hidden_states", "attentions", "router_logits"):
        if not hasattr(theirs, field):  # 5.17 has no router_logits in its outputs
            continue
        mine, other = getattr(ours, field) or (), getattr(theirs, field) or ()
        assert len(mine) == len(other), field
        for a, b in zip(mine, other, strict=True):
            assert_close(a, b, torch.float32, field)
    assert len(ours.attentions or ()) == model.config.layer_types.count("full_attention")


def test_greedy_text(pair):
    model, native = pair
    ids = token_ids(2, 11)
    kwargs = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=96)
    # the native cache counts tokens on MLA layers only
    has_mla = "full_attention" in model.config.layer_types
    expected = native.generate(ids, **kwargs, use_cache=has_mla)
    assert model.generate(ids, **kwargs).tolist() == expected.tolist()
