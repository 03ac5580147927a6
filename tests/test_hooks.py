"""Hooks, replaced modules and offloaded weights act in every call, with and without a past."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from builders import tiny_model, token_ids
from tolerance import assert_close
from torch import nn

from kimi_linear import KimiLinearForCausalLM

pytestmark = pytest.mark.core

IDS = token_ids(2, 12)
COMMON = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=96)
MODES = {"greedy": {}, "beams": {"num_beams": 3}, "lookup": {"prompt_lookup_num_tokens": 2}}


def in_pieces(model, cuts=(5, 1, 6), mask=None):
    """Logits of IDS by calls with a past."""
    cache, parts, stop = None, [], 0
    for part in IDS.split(cuts, dim=1):
        stop += part.shape[1]
        seen = None if mask is None else mask[:, :stop]
        out = model(part, attention_mask=seen, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def test_hooks_of_every_module_are_called_in_every_call():
    model, called = tiny_model("alternating"), set()
    names = {name for name, module in model.named_modules() if type(module) is not nn.ModuleList}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.add(name))
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).cache
        assert not names - called
        for part in IDS[:, 5:].split((1, 6), dim=1):
            called.clear()
            model(part, cache=cache)
            assert not names - called


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_hook_that_changes_kv_b_proj_acts_on_cached_tokens(attention, padded):
    model = tiny_model("alternating")
    model.set_attn_implementation(attention)
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :3] = 0
    plain = in_pieces(model, mask=mask).detach()
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "kv_b_proj"):
            layer.self_attn.kv_b_proj.register_forward_hook(lambda m, x, out: out.tanh() * 2 + 0.1)
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, use_cache=False).logits
        pieces = in_pieces(model, mask=mask)
    real = mask.bool()
    assert_close(pieces[real], whole[real], torch.float32)
    assert (pieces - plain)[real].abs().max() > 1e-3
    assert pieces.isfinite().all()


def test_another_module_in_its_place_acts_on_cached_tokens():
    class Squashed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).sin() * 3

    model = tiny_model("mla_first")
    model.model.layers[0].self_attn.kv_b_proj = Squashed(model.model.layers[0].self_attn.kv_b_proj)
    with torch.no_grad():
        assert_close(in_pieces(model), model(IDS, use_cache=False).logits, torch.float32)


class Doubled(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x) * 2


CHANGES = {
    "forward hook": lambda act: act.register_forward_hook(lambda m, inputs, out: out * 2),
    "forward pre-hook": lambda act: act.register_forward_pre_hook(lambda m, inputs: inputs[0] + 1),
    "backward hook": lambda act: act.register_full_backward_hook(
        lambda m, grads, _: [grads[0] * 2]
    ),
    "another forward": lambda act: setattr(act, "forward", Doubled().forward),
    "another module": None,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_hooks_on_activations_and_others_in_their_place_act_in_training(kind):
    """Grouped products of training computed the experts' activation themselves."""
    found = {}
    for experts in ("grouped_mm", "eager"):
        model = tiny_model().train()
        model.set_experts_implementation(experts)
        plain = model(IDS, labels=IDS).loss
        plain_grad = torch.autograd.grad(plain, model.model.embed_tokens.weight)[0]
        for module in [each for each in model.modules() if hasattr(each, "act_fn")]:
            if kind == "another module":
                module.act_fn = Doubled()
            else:
                CHANGES[kind](module.act_fn)
        loss = model(IDS, labels=IDS).loss
        grad = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
        assert (loss - plain).abs() > 1e-6 or kind == "backward hook"
        assert (grad - plain_grad).abs().max() > 1e-6
        found[experts] = loss, grad
    for actual, expected in zip(*found.values(), strict=True):
        assert_close(actual, expected, torch.float32)


def offload(model, kind, folder):
    if kind == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if kind == "disk_offload":
        return disk_offload(model, folder, execution_device=torch.device("cpu"))
    if kind == "device_map":
        model.save_pretrained(folder / "model")
        names = ["model.embed_tokens", "model.norm", "lm_head"]
        places = dict.fromkeys(names, "cpu")
        places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
        return KimiLinearForCausalLM.from_pretrained(
            folder / "model", device_map=places, offload_folder=folder / "offload"
        )
    parts = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    parts |= {
        f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"
    }
    for i, layer in enumerate(model.model.layers):  # one part of one layer
        for name, _ in layer.named_children():
            is_away = i == 3 and name == "self_attn"
            parts[f"model.layers.{i}.{name}"] = "disk" if is_away else "cpu"
    return dispatch_model(model, parts, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "device_map", "one part"])
def test_offloaded_weights_give_the_same_text(tmp_path, kind, mode):
    ids = IDS[:1] if "prompt_lookup_num_tokens" in mode else IDS
    expected = tiny_model("alternating").generate(ids, **mode, **COMMON)
    model = offload(tiny_model("alternating"), kind, tmp_path).eval()
    assert torch.equal(model.generate(ids, **mode, **COMMON), expected)
    assert any(p.is_meta for p in model.parameters())
