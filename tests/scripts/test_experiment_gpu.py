"""The experiments on a CUDA device: FLA's kernels beside the torch forms, recorded steps beside
plain ones, the decode graph for both patterns."""

from typing import Any

import experiment_decoding
import pytest
import torch
from experiment_kernels import Inputs, Runner, Settings
from experiments.layers import build_model, decayed_attention, gated_delta_rule
from experiments.tasks import Task, generators
from experiments.training import Learner, Recipe
from tolerance import assert_kernel_close
from torch import Tensor

pytestmark = pytest.mark.gpu
T = 100  # no multiple of a chunk


def inputs() -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, device="cuda")
        return x.bfloat16().requires_grad_()

    return [normal(2, T, 3, 64) for _ in range(3)] + [normal(2, T, 3) for _ in range(2)]


def compare(call: Any, tensors: list[Tensor]) -> None:
    """Values and gradients by FLA beside those by torch in float32."""
    wide = [x.detach().float().requires_grad_() for x in tensors]
    found, expected = call(*tensors, backend="fla"), call(*wide, backend="torch")
    assert_kernel_close(found.float(), expected, torch.bfloat16, "output")
    weight = torch.randn(expected.shape, device="cuda")
    (found.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for i, (x, reference) in enumerate(zip(tensors, wide, strict=True)):
        assert_kernel_close(x.grad.float(), reference.grad, torch.bfloat16, f"gradient {i}", 2)


def test_gated_delta_rule_by_fla() -> None:
    A_log, dt_bias = torch.tensor([0.0, 1.0, 2.0]).cuda(), torch.tensor([-3.0, -2.0, -4.0]).cuda()

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, beta: Tensor, backend: str) -> Tensor:
        decays = {"A_log": A_log, "dt_bias": dt_bias}
        return gated_delta_rule(q, k, v, a, beta, **decays, backend=backend)

    compare(call, inputs())


def test_decayed_attention_by_fla() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, backend: str) -> Tensor:
        return decayed_attention(q, k, v, -0.1 * a.float().square(), backend=backend)

    compare(call, inputs()[:4])


@pytest.mark.parametrize("mixer", ["kda", "gdn", "mamba2", "mla"])
def test_recorded_steps_equal_plain_ones(mixer: str) -> None:
    task, losses, rights = Task("mqar", 32, 16), {}, {}
    for is_recorded in (True, False):
        train, test = generators(0, torch.device("cuda"))
        model = build_model(mixer, task.vocab_size, 0, head_dim=64).cuda()
        recipe = Recipe(1e-3, warmup=2, is_bfloat16=True, is_recorded=is_recorded)
        learner = Learner(model, recipe, (8, 32))
        assert learner.graph_error == "" and (learner.graph is not None) == is_recorded
        found = []
        for _ in range(20):
            learner.step(*task.sample(8, train))
            torch.cuda.synchronize()
            found.append(float(learner.loss))
        losses[is_recorded] = torch.tensor(found)
        rights[is_recorded] = learner.count_right(*task.sample(8, test)).tolist()
    # the first losses are those of the same weights; later ones drift apart by rounding
    torch.testing.assert_close(losses[True][:3], losses[False][:3], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(losses[True], losses[False], rtol=5e-2, atol=5e-2)
    assert losses[True][-1] < losses[True][0]
    assert rights[True][1] == rights[False][1] > 0


@pytest.mark.parametrize("name", ["dplr", "kda-safe", "dplr-safe"])
def test_general_operator_by_fla(name: str) -> None:
    x = Inputs.random(256, Settings(heads=2), torch.device("cuda"), torch.bfloat16)
    with torch.no_grad():
        found, expected = (Runner(n, x).forward().float() for n in (name, "kda"))
    assert_kernel_close(found, expected, torch.bfloat16, name, 2)


def test_both_patterns_decode_by_the_graph() -> None:
    lines = experiment_decoding.main(
        preset="300m", device="cuda", contexts=(2048,), steps=4, repeats=1, max_rows=6
    )
    found = [line for line in lines if line["event"] == "decode"]
    assert {(x["model"], x["rows"]) for x in found} == {
        (model, rows) for model in ("kimi", "mla") for rows in (1, 6)
    }
    assert {x.get("backend", x.get("error")) for x in found} == {"graph"}
