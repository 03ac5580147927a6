"""Classification heads under Trainer: accumulated steps are those of one large batch."""

import pytest
import torch
from builders import tiny_config, token_ids
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from kimi_linear import KimiLinearForSequenceClassification, KimiLinearForTokenClassification

pytestmark = pytest.mark.core

KINDS = {
    "classes": (KimiLinearForSequenceClassification, {}),
    "regression": (KimiLinearForSequenceClassification, {"num_labels": 1}),
    "several labels": (
        KimiLinearForSequenceClassification,
        {"problem_type": "multi_label_classification"},
    ),
    "tokens": (KimiLinearForTokenClassification, {}),
}


class Rows(Dataset):
    def __init__(self, kind):
        self.ids, gen = token_ids(8, 10), torch.Generator().manual_seed(3)
        self.labels = {
            "classes": torch.randint(0, 3, (8,), generator=gen),
            "regression": torch.randn(8, generator=gen),
            "several labels": torch.randint(0, 2, (8, 3), generator=gen).float(),
            "tokens": torch.randint(0, 3, (8, 10), generator=gen),
        }[kind]
        if kind == "tokens":
            self.labels[:4, 3:] = -100  # micro-batches with fewer labels than others

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def train(kind, folder, batch, accumulated):
    make, fields = KINDS[kind]
    torch.manual_seed(0)
    model = make(tiny_config(**{"num_labels": 3, "classifier_dropout": 0.0, **fields}))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        data_seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(kind))
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_are_those_of_one_large_batch(kind, tmp_path):
    loss, weights = train(kind, tmp_path / "one", 8, 1)
    others = train(kind, tmp_path / "four", 2, 4)
    assert others[0] == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(others[1], weights, atol=1e-5, rtol=1e-5)
