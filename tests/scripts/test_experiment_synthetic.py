"""scripts/experiment_synthetic.py: its tasks, the layers it compares, and small trainings."""

import json
from pathlib import Path
from typing import Any

import experiment_synthetic
import pytest
import torch
from experiments.layers import MIXERS, Mamba2, build_model, decayed_attention, gated_delta_rule
from experiments.runs import Clock, Lines, parse_share, read_experiment
from experiments.tasks import IGNORED, NUM_STACKS, TASKS, Task, generators
from experiments.training import Learner, Pool, Recipe
from one_thread import one_thread  # noqa: F401
from tolerance import assert_close
from torch import Tensor

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "device": "cpu",
    "lengths": (16,),
    "symbols": 8,
    "head_dim": 16,
    "learning_rates": (3e-3, 1e-3),
    "batch_tokens": 64,
    "eval_rows": 4,
    "warmup": 2,
}


def sample(name: str, length: int = 30, symbols: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    return Task(name, length, symbols).sample(5, generators(seed, CPU)[0])


# ---- tasks --------------------------------------------------------------------------------------


def test_palindrome_is_the_text_reversed() -> None:
    ids, labels = sample("palindrome")
    assert ids.shape == labels.shape == (5, 30)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        text = row[:15]
        assert row[15] == 20 and max(text) < 20
        assert [*row[16:], wanted[-1]] == text[::-1]
        assert wanted[:16] == [IGNORED] * 16
        assert wanted[16:-1] == row[17:]  # what is predicted comes next


def test_mqar_asks_for_the_value_of_each_key() -> None:
    ids, labels = sample("mqar")
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        keys, values = row[0:14:2], row[1:14:2]
        assert len(set(keys)) == 7 and max(keys) < 20 <= min(values) and max(values) < 40
        assert row[14] == 40 and wanted[:15] == [IGNORED] * 15
        known = dict(zip(keys, values, strict=True))
        assert wanted[15:] == [known[query] for query in row[15:]]


def test_stacks_are_last_in_first_out() -> None:
    ids, labels = sample("stack", length=300)
    pops = 0
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        stacks: dict[int, list[int]] = {}
        for i in range(0, len(row), 3):
            operation, stack, element = row[i : i + 3]
            assert 20 <= stack < 20 + NUM_STACKS and element < 20
            assert wanted[i] == wanted[i + 2] == IGNORED
            if operation == 20 + NUM_STACKS:
                stacks.setdefault(stack, []).append(element)
                assert wanted[i + 1] == IGNORED
            else:
                assert operation == 20 + NUM_STACKS + 1
                assert wanted[i + 1] == element == stacks[stack].pop()
                pops += 1
    assert 0.3 < pops / 500 < 0.55  # of 500 operations


@pytest.mark.parametrize("name", TASKS)
def test_training_and_test_sequences_differ(name: str) -> None:
    task = Task(name, 30, 20)
    first, again = (task.sample(5, generators(3, CPU)[0])[0] for _ in range(2))
    assert torch.equal(first, again)
    others = [task.sample(5, generators(3, CPU)[1])[0], task.sample(5, generators(4, CPU)[0])[0]]
    assert not any(torch.equal(first, other) for other in others)
    assert int(first.max()) < task.vocab_size


def test_what_a_task_refuses() -> None:
    with pytest.raises(ValueError, match="task 'copy' is not allowed"):
        Task("copy", 30, 20)
    with pytest.raises(ValueError, match="length 7 is not allowed"):
        Task("stack", 7, 20)
    with pytest.raises(ValueError, match="symbols=20 is not allowed: mqar of length 100"):
        Task("mqar", 100, 20)


# ---- layers -------------------------------------------------------------------------------------


def random_inputs(T: int = 37) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(2, T, 3, 16, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.randn(2, T, 3, dtype=torch.float64)


def test_gated_delta_rule_is_its_recurrence() -> None:
    q, k, v, a = random_inputs()
    beta = torch.randn_like(a)
    A_log, dt_bias = torch.randn(3).double(), torch.randn(3).double()
    out = gated_delta_rule(q, k, v, a, beta, A_log=A_log, dt_bias=dt_bias)
    decay = (-A_log.exp() * torch.nn.functional.softplus(a + dt_bias)).exp()
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state, expected = torch.zeros(2, 3, 16, 16, dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        error = error * beta[:, t].sigmoid().unsqueeze(-1)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        expected.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 16**-0.5, state))
    assert_close(out, torch.stack(expected, dim=1), torch.float64)


def test_decayed_attention_is_its_recurrence() -> None:
    q, k, v, a = random_inputs()
    g = -a.abs()
    state, expected = torch.zeros(2, 3, 16, 16, dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        expected.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    assert_close(decayed_attention(q, k, v, g), torch.stack(expected, dim=1), torch.float64)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_model_is_causal_and_trains_all_weights(mixer: str) -> None:
    model = build_model(mixer, 24, 0, num_layers=2, num_heads=3, head_dim=16)
    ids = torch.randint(24, (2, 20))
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 24
    first, second = (model(x, use_cache=False).logits for x in (ids, changed))
    assert_close(first[:, :12], second[:, :12], torch.float32)
    assert not torch.allclose(first[:, 12:], second[:, 12:])
    first.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_unknown_mixer() -> None:
    with pytest.raises(ValueError, match="model 'rwkv' is not allowed"):
        build_model("rwkv", 24, 0)


# ---- training -----------------------------------------------------------------------------------


def test_kda_learns_to_reverse() -> None:
    """From chance, 1 in 8, to more than 17 of 20 answers on sequences it has not seen."""
    task = Task("palindrome", 12, 8)
    train, test = generators(0, CPU)
    model = build_model("kda", task.vocab_size, 0, head_dim=32)
    learner = Learner(model, Recipe(5e-3, warmup=10), (32, 12))
    pool, held_out = Pool(lambda n: task.sample(n, train), 32, 16), task.sample(128, test)
    right, total = learner.count_right(*held_out).tolist()
    assert total == 128 * 5 and right / total < 0.3
    for _ in range(60):
        learner.step(*pool.batch())
    right, _ = learner.count_right(*held_out).tolist()
    assert right / total > 0.85


def test_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(1.0, warmup=4, decay_steps=(10, 20))
    assert [recipe.rate(step) for step in (1, 2, 4, 10)] == [0.25, 0.5, 1.0, 1.0]
    assert recipe.rate(16) == pytest.approx(0.5) and recipe.rate(20) == pytest.approx(0.1)


def test_pool_gives_each_batch_once() -> None:
    made: list[int] = []

    def rows(count: int) -> tuple[Tensor, Tensor]:
        made.append(count)
        ids = torch.arange(count).unsqueeze(1) + 1000 * len(made)
        return ids, -ids

    pool = Pool(rows, 2, 3)
    batches = [pool.batch() for _ in range(4)]
    assert made == [6, 6]
    assert [ids.flatten().tolist() for ids, _ in batches] == [
        [1000, 1001],
        [1002, 1003],
        [1004, 1005],
        [2000, 2001],
    ]
    assert all(torch.equal(ids, -labels) for ids, labels in batches)


# ---- the script ---------------------------------------------------------------------------------


def test_a_run_prunes_and_is_not_repeated(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    options = {**TINY, "models": ("kda", "mamba2"), "tasks": ("palindrome", "stack")}
    options |= {"max_steps": 6, "grid_steps": 2, "eval_every": 3, "output": output, "learned": 0.0}
    lines = experiment_synthetic.main(**options)
    ends = [line for line in lines if line["event"] == "run"]
    stopped = sorted((end["task"], end["model"], end["stopped"]) for end in ends)
    expected = [
        (task, model, how)
        for task in ("palindrome", "stack")
        for model in ("kda", "mamba2")
        for how in ("pruned", "steps")
    ]
    assert stopped == expected
    for end in ends:
        assert end["steps"] == (2 if end["stopped"] == "pruned" else 6)
        assert end["steps_to_target"] is None and end["best_accuracy"] >= end["accuracy"]
        rivals = [x for x in ends if (x["task"], x["model"]) == (end["task"], end["model"])]
        assert len({x["learning_rate"] for x in rivals}) == 2
    steps = [line["step"] for line in lines if line["event"] == "point"]
    assert set(steps) == {2, 3, 6} and steps.count(2) == 8 and steps.count(6) == 4
    assert [json.loads(text) for text in output.read_text().splitlines()] == lines
    again = experiment_synthetic.main(**options)
    assert [line["event"] for line in again] == ["environment"]  # nothing left to do


def test_noise_does_not_choose_a_learning_rate() -> None:
    """As long as none has learned anything, all go on."""
    options = {**TINY, "models": ("kda",), "tasks": ("palindrome",), "learned": 1.0}
    lines = experiment_synthetic.main(**options, max_steps=6, grid_steps=2, eval_every=3)
    assert [line["stopped"] for line in lines if line["event"] == "run"] == ["steps", "steps"]


def test_the_first_at_the_target_ends_its_rivals(tmp_path: Path) -> None:
    lines = experiment_synthetic.main(
        **TINY, tasks=("mqar",), models=("kda",), max_steps=4, eval_every=2, target=1e-9
    )
    ends = {line["learning_rate"]: line for line in lines if line["event"] == "run"}
    assert {end["stopped"] for end in ends.values()} <= {"target", "beaten"}
    reached = [end for end in ends.values() if end["stopped"] == "target"]
    assert reached and all(end["steps_to_target"] == end["steps"] for end in reached)


def test_time_limit_ends_a_run_with_what_it_has() -> None:
    lines = experiment_synthetic.main(
        **TINY, tasks=("mqar",), models=("kda",), max_steps=10**6, eval_every=2, time_limit=0.5
    )
    ends = [line for line in lines if line["event"] == "run"]
    assert len(ends) == 2 and {end["stopped"] for end in ends} == {"time"}


def test_a_model_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def broken(self: Learner, ids: Tensor, labels: Tensor) -> None:
        if isinstance(self.model.model.layers[0].self_attn, Mamba2):
            raise RuntimeError("no such kernel")
        step(self, ids, labels)

    monkeypatch.setattr(Learner, "step", broken)
    options = {**TINY, "tasks": ("mqar",), "learning_rates": (1e-3,), "max_steps": 2}
    lines = experiment_synthetic.main(**options, models=("kda", "mamba2"))
    ends = {line["model"]: line for line in lines if line["event"] == "run"}
    assert ends["mamba2"]["error"] == "RuntimeError: no such kernel"
    assert ends["kda"]["stopped"] == "steps" and ends["kda"]["steps"] == 2


def test_shares_divide_the_groups() -> None:
    options = {**TINY, "models": ("kda",), "max_steps": 1}
    found = []
    for i in range(2):
        lines = experiment_synthetic.main(**options, share=(i, 2))
        found.append({line["task"] for line in lines if line["event"] == "run"})
    assert found[0].isdisjoint(found[1]) and found[0] | found[1] == set(TASKS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("copy",)}, "--tasks 'copy' is not allowed"),
        ({"models": ()}, "--models"),
        ({"target": 1.5}, "--target 1.5 is not allowed"),
        ({"head_dim": 20}, "--head-dim 20 is not allowed"),
        ({"max_steps": 0}, "--max-steps 0 is not allowed"),
        ({"learning_rates": (0.0,)}, "--learning-rates"),
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"time_limit": 0.0}, "--time-limit 0.0"),
        ({"lengths": (4,)}, "length 4 is not allowed"),
    ],
)
def test_what_the_script_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment_synthetic.main(**{**TINY, **options})


def test_shared_parts(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    Lines("one", path).tell("point", value=1.23456789)
    Lines("two", path).tell("point", value=2)
    with path.open("a") as file:
        file.write('{"experiment": "one", "ev')  # cut off
    (line,) = read_experiment([path], "one")
    assert line == {"experiment": "one", "event": "point", "value": 1.2346}
    with pytest.raises(ValueError, match="missing.jsonl is not allowed"):
        read_experiment([tmp_path / "missing.jsonl"], "one")
    assert parse_share("2/4") == (2, 4)
    for text in ("4/4", "-1/2", "x"):
        with pytest.raises(Exception, match="is not allowed"):
            parse_share(text)
    assert not Clock(None).is_over and Clock(1e-9).is_over
