"""scripts/experiments/decays.py: models between KDA and Gated DeltaNet, and their half-lives."""

import math

import pytest
import torch
from experiments.decays import DECAYS, SLOWER, build_with_decays, half_lives
from experiments.layers import build_model
from one_thread import one_thread  # noqa: F401
from tolerance import assert_close
from torch import Tensor, nn

SIZES = {"num_heads": 3, "head_dim": 16}
IDS = torch.arange(40).view(2, 20) % 24


def steps(kind: str) -> Tensor:
    """What the first layer's steps are before a token says anything, [H, K] or [H, 1]."""
    layer = build_with_decays(kind, 24, 0, **SIZES).model.layers[0].self_attn
    return nn.functional.softplus(layer.dt_bias.detach()).view(3, -1)


@pytest.mark.parametrize("kind", DECAYS)
def test_every_kind_is_causal_and_trains_all_weights(kind: str) -> None:
    model = build_with_decays(kind, 24, 0, **SIZES)
    changed = IDS.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 24
    first, second = (model(x, use_cache=False).logits for x in (IDS, changed))
    assert_close(first[:, :12], second[:, :12], torch.float32)
    assert not torch.allclose(first[:, 12:], second[:, 12:])
    first.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_how_decays_begin() -> None:
    kda, gdn = steps("kda"), steps("gdn")
    assert kda.shape == (3, 16) and gdn.shape == (3, 1) and kda.std(1).min() > 0
    even = steps("kda-even")
    assert_close(even, kda[:, :1].expand_as(even), torch.float32)
    torch.testing.assert_close(steps("kda-slow") * SLOWER, kda, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(steps("gdn-slow") * SLOWER, gdn, rtol=1e-3, atol=0.0)
    assert_close(steps("kda-full"), kda, torch.float32)
    spread = steps("gdn-spread")
    assert spread.shape == (3, 16) and spread.std(1).min() > 0
    assert spread.min() >= 1e-3 and spread.max() <= 0.1


@torch.no_grad()
def test_gated_deltanet_is_a_kind_whose_channels_begin_alike() -> None:
    model, spread = (build_with_decays(kind, 24, 0, **SIZES) for kind in ("gdn", "gdn-spread"))
    weights = model.state_dict()
    for name in list(weights):
        if name.endswith("dt_bias"):
            weights[name] = weights[name].repeat_interleave(16)
    spread.load_state_dict(weights)
    found, expected = (x(IDS, use_cache=False).logits for x in (spread, model))
    assert_close(found, expected, torch.float32)


@torch.no_grad()
def test_half_lives() -> None:
    model = build_with_decays("kda", 24, 0, **SIZES)
    for layer in model.model.layers:
        layer.self_attn.f_b_proj.weight.zero_()
        layer.self_attn.A_log.zero_()
        layer.self_attn.dt_bias.fill_(math.log(math.expm1(0.01)))
    for found in half_lives(model, IDS):
        assert found == pytest.approx([100 * math.log(2)] * 3, abs=0.02)
    assert len(half_lives(build_model("gdn", 24, 0, **SIZES), IDS)) == 2
    assert half_lives(build_model("mamba2", 24, 0, **SIZES), IDS) == []
    assert not any(module._forward_hooks for module in model.modules())
