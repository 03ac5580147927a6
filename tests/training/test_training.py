"""Training: what a step makes and keeps, and Transformers' Trainer around it."""

import pytest
import torch
from builders import tiny_model, token_ids
from tolerance import assert_close
from transformers import Trainer, TrainingArguments

from kimi_linear.layers import delta_attention
from kimi_linear.ops import cross_entropy as loss_kimi_linear
from kimi_linear.training.deferred_logits import DeferredLogits

pytestmark = [pytest.mark.core, pytest.mark.kernels]


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_makes_no_states_and_no_cache(monkeypatch, packed):
    asked = []

    def noted(function):
        def call(*args, **kwargs):
            asked.append((kwargs["output_final_state"], kwargs["initial_state"]))
            out, *states = function(*args, **kwargs)
            assert not any(state is not None for state in states)
            return out, *states

        return call

    for name in ("kda_attention_and_cut", "short_convolution"):
        monkeypatch.setattr(delta_attention, name, noted(getattr(delta_attention, name)))
    model, ids = tiny_model().train(), token_ids(2, 30)
    positions = torch.arange(30).expand(2, -1) % 11 if packed else None
    out = model(ids, labels=ids, position_ids=positions)
    out.loss.backward()
    assert out.cache is None
    assert asked == [(False, None)] * (3 * (1 + 3))


class Keeping(Trainer):
    """Reads the logits of each training step, as TRL does for its metrics."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            logits = outputs.logits
            predictions = logits[..., :-1, :].argmax(dim=-1)
            hits = predictions == inputs["input_ids"][..., 1:]
            self.seen.append((type(logits), logits.shape, hits.float().mean().item()))
        return (loss, outputs) if return_outputs else loss


def train(tmp_path, backend, trainer_class=Trainer, **arguments):
    model = tiny_model("all_kda", num_hidden_layers=2).train()
    model.loss_backend = backend
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 24)]
    rows[0]["labels"] = rows[0]["labels"].masked_fill(torch.arange(24) < 15, -100)
    trainer = trainer_class(
        model,
        TrainingArguments(
            tmp_path / backend,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda p: {"width": p.predictions.shape[-1]},
    )
    trainer.seen = []
    trainer.train()
    return trainer


def losses(trainer):
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


@pytest.mark.parametrize(
    "arguments", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=["", "bf16", "smooth"]
)
def test_trainer(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(loss_kimi_linear, "CHUNK_ELEMENTS", 97 * 16)
    monkeypatch.setattr(loss_kimi_linear, "MIN_CHUNK_TOKENS", 1)
    fused, wide = (train(tmp_path, backend, **arguments) for backend in ("auto", "logits"))
    dtype = torch.bfloat16 if "bf16" in arguments else torch.float32
    assert len(losses(fused)) == 2
    assert_close(losses(fused), losses(wide), dtype)
    for (name, ours), theirs in zip(
        fused.model.named_parameters(), wide.model.parameters(), strict=True
    ):
        if dtype == torch.float32:  # Adam takes steps of one size, whatever a gradient's error is
            assert (ours - theirs).abs().max() < 2e-5, name
    metrics = fused.evaluate()
    assert metrics["eval_width"] == 97 and metrics["eval_loss"] > 0


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_in_training_steps_are_there_for_who_reads_them(tmp_path, bf16):
    fused, wide = (train(tmp_path, each, Keeping, bf16=bf16) for each in ("auto", "logits"))
    assert len(fused.seen) == len(wide.seen) == 4
    for (kind, shape, accuracy), (_, expected_shape, expected) in zip(
        fused.seen, wide.seen, strict=True
    ):
        assert kind is DeferredLogits and shape == expected_shape
        assert abs(accuracy - expected) < (0.1 if bf16 else 1e-6)
