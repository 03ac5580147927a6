"""Every parameter in exactly one group, and in which."""

import sys

import pytest
import torch
from builders import tiny_config, tiny_model, token_ids
from learning.optimizers import make_optimizer
from torch import nn

from kimi_linear.modeling_kimi_linear import (
    KimiLinearForSequenceClassification,
    KimiLinearForTokenClassification,
)
from kimi_linear.training.parameter_groups import parameter_groups, parameter_kinds

pytestmark = pytest.mark.transformers

MODELS = {
    "causal": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "low-rank queries": lambda: tiny_model(q_lora_rank=9),
    "no shared experts": lambda: tiny_model(num_shared_experts=0),
    "sequences": lambda: KimiLinearForSequenceClassification(tiny_config(num_labels=3)),
    "tokens": lambda: KimiLinearForTokenClassification(tiny_config(num_labels=3)),
    "backbone": lambda: tiny_model().model,
}


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_exactly_one_group(name, muon):
    model = MODELS[name]()
    groups = parameter_groups(model, 0.1, muon=muon)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["weight_decay"] for group in groups] == ([0.1, 0.1, 0.0] if muon else [0.1, 0.0])
    assert all(("muon" in group) == muon for group in groups)


def test_kinds():
    kinds = parameter_kinds(tiny_model(q_lora_rank=9))
    ends = {
        "matrix": {"q_a_proj", "kv_b_proj", "b_proj", "f_a_proj", "gate", "gate_proj", "o_proj"},
        "end": {"embed_tokens", "lm_head"},
        "taps": {"q_conv1d", "k_conv1d", "v_conv1d"},
        "vector": {"o_norm", "q_a_layernorm", "kv_a_layernorm", "input_layernorm", "norm"},
    }
    for kind, owners in ends.items():
        for owner in owners:
            matching = [name for name in kinds if name.endswith(f"{owner}.weight")]
            assert matching and {kinds[name] for name in matching} == {kind}, owner
    layer, moe = "model.layers.0.self_attn", "model.layers.1.block_sparse_moe.experts"
    assert kinds[f"{layer}.A_log"] == kinds[f"{layer}.dt_bias"] == "vector"
    assert kinds[f"{moe}.gate_up_proj"] == kinds[f"{moe}.down_proj"] == "matrix"
    assert not any("e_score_correction_bias" in name for name in kinds)
    heads = parameter_kinds(MODELS["tokens"]())
    assert heads["score.weight"] == "end" and heads["score.bias"] == "vector"


def test_frozen_parameters_are_in_none():
    model = tiny_model().requires_grad_(False)
    assert parameter_groups(model, 0.1) == []
    model.lm_head.requires_grad_(True)
    (group,) = parameter_groups(model, 0.1)
    assert group["params"][0] is model.lm_head.weight and group["weight_decay"] == 0.1


def test_an_unknown_parameter_is_an_error():
    model = tiny_model()
    model.model.layers[0].self_attn.register_parameter("gain", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.gain of shape \(3,\) is not known"):
        parameter_groups(model, 0.1)
    model = tiny_model()
    model.extra = nn.Conv1d(3, 4, 2)
    with pytest.raises(ValueError, match=r"parameter extra.weight of shape \(4, 3, 2\)"):
        parameter_groups(model, 0.1)
    with pytest.raises(ValueError, match="weight_decay=-1 is not allowed"):
        parameter_groups(tiny_model(), -1)


def test_only_what_is_decayed_shrinks():
    model, ids = tiny_model().train(), token_ids(2, 20)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5), lr=0.1)
    (model(ids, labels=ids).loss * 0).backward()
    optimizer.step()
    kinds = parameter_kinds(model)
    for name, parameter in model.named_parameters():
        factor = 1.0 if kinds[name] == "vector" else 0.95
        torch.testing.assert_close(parameter.data, before[name] * factor)


def test_adapters_are_matrices():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_model(), config)
    kinds = parameter_kinds(model)
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {"matrix"}
    assert {kind for name, kind in kinds.items() if "lm_head" in name} == {"end"}
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(kinds)


def test_states_of_8_bits(tmp_path):
    """Close to AdamW; embeddings keep 32 bits; what is saved goes on to the same bits."""
    pytest.importorskip("bitsandbytes", reason="8-bit optimizers need bitsandbytes")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64}  # tensors of 4,096 numbers and more
    ours, plain = (tiny_model(**sizes).train() for _ in "ab")
    pair = [make_optimizer(k, m, 1e-3, 0.1) for k, m in (("adamw8bit", ours), ("adamw", plain))]

    def step(model, optimizer, seed):
        model(ids := token_ids(2, 16, seed=seed), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(3):
        for model, optimizer in zip((ours, plain), pair, strict=True):
            step(model, optimizer, seed)
    states = {n: pair[0].state[p]["state1"].dtype for n, p in ours.named_parameters()}
    assert states["model.layers.1.block_sparse_moe.experts.gate_up_proj"] == torch.uint8
    assert states["model.embed_tokens.weight"] == torch.float32
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (mine - theirs).abs().max() <= 3e-3, name  # three steps of at most 1e-3
    assert not torch.equal(ours.lm_head.weight, tiny_model(**sizes).lm_head.weight)
    torch.save([ours.state_dict(), pair[0].state_dict()], tmp_path / "state.pt")
    again = tiny_model(**sizes).train()
    weights, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=False)
    again.load_state_dict(weights)
    other = make_optimizer("adamw8bit", again, 1e-3, 0.1)
    other.load_state_dict(optimizer_state)
    step(ours, pair[0], 7)
    step(again, other, 7)
    for mine, theirs in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_8_bits_without_bitsandbytes_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="optimizer='adamw8bit' needs bitsandbytes"):
        make_optimizer("adamw8bit", tiny_model(), 1e-3, 0.1)
