"""Steps that are not finite, and checkpoints whose writing is interrupted."""

import errno
import json
import os
import resource
import socket
from pathlib import Path

import commands
import pytest
import safe_training_worker as worker
import torch
from safe_training_worker import make_trainer
from transformers.trainer_utils import get_last_checkpoint

from kimi_linear.checkpoints.atomic import atomic_folder
from kimi_linear.training.bias_callback import balance_experts
from kimi_linear.training.finite import not_finite_gradients, not_finite_states, not_finite_weights
from kimi_linear.training.safe_trainer import SafeTrainer

pytestmark = pytest.mark.core

BAD_NAME = "model.layers.0.mlp.up_proj.weight"


def states_equal(one, two):
    two = dict(two)
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Breaking(SafeTrainer):
    """Spoils the gradients of the step numbers in `bad`, or the loss."""

    bad, value, in_loss, at_call = (), float("nan"), False, 1

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        self.calls = getattr(self, "calls", 0) + 1
        is_bad = self.state.global_step + 1 in self.bad and self.calls % 2 == self.at_call
        if is_bad and self.in_loss:
            return loss * self.value
        if is_bad:
            weight = dict(model.named_parameters())[BAD_NAME]
            return loss + _Spoil.apply(weight, self.value)
        return loss


class _Spoil(torch.autograd.Function):
    """0, whose gradient has one element that is `value`."""

    @staticmethod
    def forward(ctx, weight, value):
        ctx.like, ctx.value = weight, value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        spoiled = torch.zeros_like(ctx.like)
        spoiled[1, 2] = ctx.value
        return spoiled, None


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "max_grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (-float("inf"), 0.0)]
)
def test_a_bad_gradient_stops_with_its_name_and_step(tmp_path, value, max_grad_norm):
    trainer = make_trainer(tmp_path, Breaking, max_grad_norm=max_grad_norm)
    trainer.bad, trainer.value = (3,), value
    with pytest.raises(FloatingPointError, match=f"step 3: .* those of {BAD_NAME}. The update"):
        trainer.train()
    assert not not_finite_weights(trainer.model)
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-2")


@pytest.mark.parametrize("at_call", [0, 1], ids=["second call", "first call"])
def test_a_bad_loss_stops(tmp_path, at_call):
    trainer = make_trainer(tmp_path, Breaking)
    trainer.bad, trainer.in_loss, trainer.at_call = (1,), True, at_call
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan.* and \d+ more"):
        trainer.train()
    assert get_last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_skipped_steps_change_nothing(tmp_path, optimizer):
    trainer = make_trainer(
        tmp_path, Breaking, bad_step="skip", optim=optimizer, weight_decay=0.1, logging_steps=1
    )
    trainer.bad = (2,)
    balance_experts(trainer, rate=0.01)
    seen = []

    class Note(worker.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(copied(model))

    trainer.add_callback(Note)
    trainer.train()
    assert trainer.skipped_steps == [2] and len(seen) == worker.STEPS
    assert states_equal(seen[0], seen[1]) and not states_equal(seen[1], seen[2])
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row.get("skipped_steps") for row in rows] == [None, *[1] * (worker.STEPS - 1)]
    assert not any("experts/dead" in row for row in rows[1:2])  # its choices do not count
    assert all("experts/dead" in row for row in rows[2:])


def test_too_many_skipped_steps_in_a_row_stop(tmp_path):
    trainer = make_trainer(tmp_path, Breaking, bad_step="skip", max_skipped=2)
    trainer.bad = (1, 3, 4, 5)
    with pytest.raises(FloatingPointError, match="step 5: .*, 3 steps before it were skipped"):
        trainer.train()
    assert trainer.skipped_steps == [1, 3, 4]


def test_without_bad_steps_it_trains_as_trainer_does(tmp_path):
    ours = make_trainer(tmp_path / "1", SafeTrainer)
    theirs = make_trainer(tmp_path / "2", worker.Trainer)
    ours.train(), theirs.train()
    assert states_equal(ours.model.state_dict(), theirs.model.state_dict())
    assert [p.name for p in sorted((tmp_path / "1").iterdir())] == [
        p.name for p in sorted((tmp_path / "2").iterdir())
    ]
    for name in ("checkpoint-4", "checkpoint-6"):
        files = [sorted(p.name for p in (tmp_path / i / name).iterdir()) for i in "12"]
        assert files[0] == files[1]


def test_two_processes_stop_together_and_keep_a_whole_checkpoint(tmp_path):
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    runs = [
        commands.start(
            [worker.__file__, tmp_path, "spoil", "1"],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    for run in runs:
        run.join(commands.PATIENCE)
    assert [run.exitcode for run in runs] == [3, 3]
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    saved = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"} <= saved


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_arguments():
    with pytest.raises(ValueError, match="bad_step='ignore' is not allowed: .*'stop', 'skip'"):
        SafeTrainer(bad_step="ignore")
    with pytest.raises(ValueError, match="max_skipped=0 is not allowed"):
        SafeTrainer(max_skipped=0)


def test_large_gradients_are_finite():
    model = torch.nn.Linear(3, 2)
    model.weight.grad = torch.full((2, 3), 3e38)  # the sum of its squares is not
    assert not_finite_gradients(model) == []
    model.bias.grad = torch.tensor([0.0, float("nan")])
    assert not_finite_gradients(model) == ["bias"]


# ---- poison --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weight", "buffer", "state"])
def test_poison_is_not_saved(tmp_path, where):
    trainer = make_trainer(tmp_path, SafeTrainer)

    class Poison(worker.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step != 4:
                return
            if where == "weight":
                model.lm_head.weight.data[1, 1] = float("inf")
            elif where == "buffer":
                model.model.layers[1].block_sparse_moe.gate.e_score_correction_bias[0] = torch.nan
            else:
                optimizer.state[model.lm_head.weight]["exp_avg_sq"][1, 1] = float("inf")

    trainer.add_callback(Poison)
    name = {"buffer": "e_score_correction_bias", "state": "lm_head.weight: exp_avg_sq"}
    name = name.get(where, "lm_head.weight")
    with pytest.raises(FloatingPointError, match=f"checkpoint-4 is not written, .*{name}"):
        trainer.train()
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-2")
    if where == "state":
        assert not_finite_states(trainer.optimizer, trainer.model) == [name]
        return
    with pytest.raises(FloatingPointError, match=f"nothing is saved, .*{name}"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """State of a run that nothing interrupts."""
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), SafeTrainer)
    trainer.train()
    return copied(trainer.model)


def checkpoints(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_while_the_optimizer_is_written(tmp_path, monkeypatch, straight):
    trainer = make_trainer(tmp_path, SafeTrainer)
    original = torch.save

    def full(obj, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(obj, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.train()
    assert any("checkpoint-4 was not written; older" in note for note in caught.value.__notes__)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, SafeTrainer)
    resumed.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert states_equal(resumed.model.state_dict(), straight)


def test_a_system_that_refuses_to_write_weights(tmp_path):
    trainer = make_trainer(tmp_path, SafeTrainer)
    trainer.train()
    before = checkpoints(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer.state.global_step = 8
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # smaller than the weights
    try:
        with pytest.raises(Exception, match="File too large"):
            trainer._save_checkpoint(trainer.model, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(tmp_path) == before
    assert all(path.read_bytes() == content for path, content in files.items())


def test_an_error_on_the_way_to_the_disk(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(tmp_path, SafeTrainer)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("moment", ["weights", "state", "rename"])
def test_killed_while_saving(tmp_path, moment, straight):
    run = commands.run([worker.__file__, tmp_path, moment, torch.get_num_threads()])
    assert run.returncode == -9, run.stderr
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-2")
    assert checkpoints(tmp_path) == ["_unfinished-4", "checkpoint-2"]
    resumed = make_trainer(tmp_path, SafeTrainer)
    resumed.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert states_equal(resumed.model.state_dict(), straight)


@pytest.mark.parametrize("steps", [4, 6], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("left", [0, 2])
def test_a_run_goes_on_for_the_steps_that_are_left(tmp_path, steps, left):
    """Bug: Trainer trained a fifth of four steps, wrote it, and called the loss of none 0."""
    options = {"max_steps": steps, "save_total_limit": 3, "logging_steps": 1}
    trainer = make_trainer(tmp_path, SafeTrainer, **options)
    whole, numbers = trainer.train(), torch.rand(3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = make_trainer(tmp_path, SafeTrainer, **options)
    checkpoint = tmp_path / f"checkpoint-{steps - left}"
    rest = again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(torch.rand(3), numbers)  # what an evaluation may sample
    assert again.state.global_step == steps
    assert states_equal(again.model.state_dict(), trainer.model.state_dict())
    assert rest.metrics["train_loss"] == pytest.approx(whole.training_loss)
    if not left:
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_best_checkpoint_is_named_and_kept(tmp_path):
    trainer = make_trainer(
        tmp_path,
        SafeTrainer,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        metric_for_best_model="worst",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    values = iter([3.0, 1.0, 2.0])
    trainer.compute_metrics = lambda predictions: {"worst": next(values)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert "checkpoint-2" in checkpoints(tmp_path)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob("unfinished*"))


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    trainer = make_trainer(tmp_path, SafeTrainer)
    trainer.train()
    (tmp_path / "checkpoint-6" / "old").write_text("")
    trainer._save_checkpoint(trainer.model, None)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / "checkpoint-6" / "old").exists()


@pytest.mark.parametrize("start", ["atomic folder", "trainer", "checkpoint"])
def test_a_folder_that_a_kill_left_aside_is_put_back(tmp_path, start):
    """Bug: the next clean-up removed the old folder and the new one."""
    trainer = make_trainer(tmp_path, SafeTrainer)
    for name, text in (("replaced-checkpoint-2", "old"), ("checkpoint-2", "new")):
        (tmp_path / f"_unfinished-{name}").mkdir()
        (tmp_path / f"_unfinished-{name}" / "x").write_text(text)
    if start == "atomic folder":
        with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "checkpoint-2"):
            raise KeyboardInterrupt
    elif start == "trainer":
        make_trainer(tmp_path, SafeTrainer)
    else:
        trainer._clear_drafts(tmp_path)
    assert (tmp_path / "checkpoint-2" / "x").read_text() == "old"
    assert not (tmp_path / "_unfinished-replaced-checkpoint-2").exists()
