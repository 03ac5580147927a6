"""Adapters over packed weights: gradients as over the same weights in full; Trainer; merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import token_ids
from few_bits_models import (
    adapt,
    everywhere,
    in_full,
    load_packed,
    mixed,
    packed_of,
    write_small_model,
)
from safetensors import safe_open
from tolerance import assert_close
from torch import Tensor
from transformers import Trainer, TrainingArguments

from kimi_linear import KimiLinearForCausalLM, quantize_model
from kimi_linear.ops.quantized import QuantizedTensor

pytestmark = [pytest.mark.transformers, pytest.mark.finetune]

peft = pytest.importorskip("peft", reason="adapters need PEFT: pip install '.[finetune]'")

IDS = token_ids(2, 21)
EXPERTS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one step, and the step."""
    loss = model(input_ids=IDS, labels=IDS, **inputs).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    model.zero_grad()
    return loss.detach(), gradients


def assert_same_steps(model: Any, plain: Any) -> None:
    """Twice, so that what a step leaves behind counts."""
    for _ in range(2):
        loss, found = step(model)
        expected_loss, expected = step(plain)
        assert_close(loss, expected_loss, torch.float32)
        assert found.keys() == expected.keys() and len(found) > 20
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("scheme", ["3 bits", "4 bits", "4 bits, zeros", "8 bits", "float8 blocks"])
def test_gradients_are_those_over_the_weights_in_full(
    folder: Path, scheme: str, experts: str
) -> None:
    model = load_packed(folder, everywhere(scheme))
    plain = adapt(in_full(model, folder), "all").train()
    packed = set(packed_of(model))
    model = adapt(model, "all").train()
    for each in (model, plain):
        each.base_model.model.set_experts_implementation(experts)
    assert_same_steps(model, plain)
    assert len(packed_of(model)) == len(packed)


@pytest.mark.parametrize("backend", ["logits", "fused"])
def test_the_loss_reads_a_packed_head(folder: Path, backend: Any) -> None:
    """Without logits too, which are made when they are read."""
    model = load_packed(folder, mixed())
    plain = adapt(in_full(model, folder), "attention").train()
    model = adapt(model, "attention").train()
    for each in (model, plain):
        each.base_model.model.loss_backend = backend
    assert_same_steps(model, plain)
    found, expected = (each(input_ids=IDS, labels=IDS).logits for each in (model, plain))
    assert_close(found + 0, expected + 0, torch.float32)
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_backward_pass_keeps_the_packed_form(folder: Path) -> None:
    """No matrix of the base in full waits for it, of linear layers, experts and head."""
    model = adapt(load_packed(folder, mixed()), "attention", "dense", "shared").train()
    wide = [weights.dequantized() for weights in packed_of(model).values()]
    wide += [matrix.mT for matrix in wide]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    plain = [x for x in kept if not isinstance(x, QuantizedTensor)]
    assert len(kept) - len(plain) > 30
    for x in plain:
        assert not any(x.shape == each.shape and torch.equal(x, each) for each in wide), x.shape
    loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(folder: Path, reentrant: bool) -> None:
    models = [adapt(load_packed(folder, mixed()), "all").train() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    (loss, expected), (found_loss, found) = map(step, models)
    assert torch.equal(loss, found_loss)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, torch.float32, name)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_adapters_over_packed_weights(
    folder: Path, tmp_path: Path, bf16: bool
) -> None:
    base = load_packed(folder, mixed(), dtype=torch.bfloat16 if bf16 else torch.float32)
    before = {name: weights.dequantized() for name, weights in packed_of(base).items()}
    model = adapt(base, "all")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=3,
        bf16=bf16,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(3, 1)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1, losses
    for name, weights in packed_of(model).items():
        own = name.removeprefix("base_model.model.").replace("base_layer.", "")
        assert torch.equal(weights.dequantized(), before[own]), name
    with safe_open(tmp_path / "checkpoint-6" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_weights_without_adapters_are_not_trained(folder: Path, tmp_path: Path) -> None:
    for model in (
        load_packed(folder, mixed()),
        quantize_model(KimiLinearForCausalLM.from_pretrained(folder), mixed()),
    ):
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized"):
            Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("group", ["attention", "experts"])
def test_merging_into_packed_weights_is_refused(folder: Path, group: str, safe: bool) -> None:
    model = adapt(load_packed(folder, mixed()), group)
    message = "cannot be written to: load the model without quantisation and merge the adapters"
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=safe)


def test_adapters_serve_both(folder: Path, tmp_path: Path) -> None:
    """They reload over the packed model to the same bits, and merge into the plain one."""
    model = adapt(load_packed(folder, mixed()), "all").eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load_packed(folder, mixed()), tmp_path).eval()
    base = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        expected = plain(IDS).logits
        assert_close(plain.merge_and_unload()(IDS).logits, expected, torch.float32)
