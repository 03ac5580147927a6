"""Schedules, Muon, and what optimizers learn."""

import pytest
import torch
from builders import tiny_model
from learning.optimizers import Muon, make_optimizer, orthogonalise, schedule_factor
from torch import nn


def test_schedules() -> None:
    assert schedule_factor("wsd", 0.01, warmup=0.02) == pytest.approx(0.5)
    assert schedule_factor("wsd", 0.5, decay=0.4) == 1.0
    assert schedule_factor("wsd", 0.8, decay=0.4) == pytest.approx(0.5)
    assert schedule_factor("cosine", 1.0) == pytest.approx(0.0)
    assert schedule_factor("cosine", 0.51, warmup=0.02) == pytest.approx(0.5)
    assert schedule_factor("constant", 0.99) == 1.0
    for kind in ("wsd", "cosine", "constant"):
        factors = [schedule_factor(kind, i / 50) for i in range(51)]
        assert all(0 <= factor <= 1 for factor in factors)
    with pytest.raises(ValueError, match="schedule='linear'"):
        schedule_factor("linear", 0.5)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 5, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape) * 100))
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_gives_each_parameter_its_rule() -> None:
    model = tiny_model()
    optimizer = make_optimizer("muon", model, 1e-3, 0.1)
    assert isinstance(optimizer, Muon)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, others, vectors = (
        [names[id(p)] for p in g["params"]] for g in optimizer.param_groups
    )
    taps = {name for name in names.values() if "conv1d" in name}
    assert set(others) == {"lm_head.weight", "model.embed_tokens.weight"} | taps
    assert any(name.endswith("experts.gate_up_proj") for name in matrices)
    assert any(name.endswith("kv_b_proj.weight") for name in matrices)
    for part in ("A_log", "dt_bias", "norm.weight"):
        assert any(name.endswith(part) for name in vectors)
        assert not any(name.endswith(part) for name in matrices)
    assert len(matrices) + len(others) + len(vectors) == len(names)


def test_muon_steps_experts_one_by_one() -> None:
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(3, 4, 6))
    single = [nn.Parameter(x.clone()) for x in fused.data]
    optimizers = [
        Muon([{"params": each, "muon": True, "weight_decay": 0.1}], 0.1)
        for each in ([fused], single)
    ]
    for _ in range(3):
        gradient = torch.randn(3, 4, 6)
        fused.grad = gradient
        for parameter, part in zip(single, gradient, strict=True):
            parameter.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.data, torch.stack([p.data for p in single]))


def test_muons_vector_rule_is_adamw() -> None:
    start, gradients = torch.randn(7), torch.randn(4, 7)
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    ours = Muon([{"params": parameters[:1], "muon": False, "weight_decay": 0.0}], 0.01)
    theirs = torch.optim.AdamW([parameters[1]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for gradient in gradients:
        for parameter, optimizer in zip(parameters, (ours, theirs), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(parameters[0].data, parameters[1].data)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_learn_a_sequence(kind: str) -> None:
    model = tiny_model(initializer_range=0.02).train()
    batch = torch.arange(5, 45).reshape(2, 20)
    optimizer = make_optimizer(kind, model, 1e-2, 0.0)
    losses = []
    for _ in range(15):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        make_optimizer("sgd", model, 1e-2, 0.0)
