"""Tensor, expert and pipeline parallelism as Transformers applies them on loading, and pipelines of
torch's, beside one process: with gloo on a CPU, with NCCL on two GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import tiny_model, token_ids
from processes import (
    DEVICE_TYPES,
    assert_same,
    assert_same_gradients,
    device,
    fits,
    here,
    run,
    whole,
)
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import cross_entropy
from transformers.distributed import DistributedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kimi_linear import KimiLinearForCausalLM, KimiLinearQuantizationConfig
from kimi_linear.parallel.tensor import joined

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
TOKENS = 24
FIELDS: dict[str, Any] = {
    "vocab_size": 100,
    "num_attention_heads": 8,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "router_aux_loss_coef": 0.01,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}
MODELS: dict[int, dict[str, Any]] = {  # by the number of processes
    2: FIELDS,
    4: {**FIELDS, "q_lora_rank": 10, "num_shared_experts": 2, "tie_word_embeddings": True},
}
# Transformers 5.17 has one number for either kind of parallelism.
IS_OLD = not hasattr(DistributedConfig, "ep_size")


def load(
    folder: str,
    name: str,
    dtype: torch.dtype = torch.float32,
    quantization: Any = None,
    **kwargs: Any,
) -> Any:
    """The saved model in float32, or in `dtype`; the other arguments are of a DistributedConfig."""
    config = DistributedConfig(**kwargs) if kwargs else None
    model = KimiLinearForCausalLM.from_pretrained(
        f"{folder}/{name}",
        distributed_config=config,
        attn_implementation="sdpa",
        dtype=dtype,
        quantization_config=quantization,
    )
    return model if kwargs else here(model)


def packed_rows() -> dict[str, torch.Tensor]:
    ids = token_ids(2, TOKENS)
    cuts = [5, 16]
    positions = torch.stack(
        [torch.cat([torch.arange(cut), torch.arange(TOKENS - cut)]) for cut in cuts]
    )
    return here({"input_ids": ids, "labels": ids, "position_ids": positions})


def same_training(model: Any, plain: Any, row: int | None = None) -> None:
    """Loss and gradients of packed rows, summed over two passes, the second with checkpointing.

    With `row`, the model reads this one of the two rows only, and averages gradients.
    """
    inputs = packed_rows()
    mine = inputs if row is None else {name: x[row : row + 1] for name, x in inputs.items()}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [each.train()(**x).loss for each, x in ((model, mine), (plain, inputs))]
        for loss in losses:
            loss.backward()
        losses = [loss.detach() for loss in losses]
        if row is not None:
            dist.all_reduce(losses[0])
            losses[0] /= dist.get_world_size()
        assert_same(*losses, "loss")
    assert_same_gradients(model, plain)


def same_text(model: Any, plain: Any) -> None:
    """Logits of left-padded rows, and greedy text behind them."""
    ids = here(token_ids(2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        assert_same(*(each(ids, attention_mask=mask).logits for each in (model, plain)), "logits")
    texts = [
        each.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for each in (model, plain)
    ]
    assert torch.equal(*texts)


def tensor_parallel(rank: int, world: int, folder: str) -> None:
    model, plain = load(folder, f"of_{world}", tp_plan="auto"), load(folder, f"of_{world}")
    kda, mla = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    assert kda.q_conv1d.weight.to_local().shape == (64 // world, 1, 4)
    assert kda.A_log.to_local().shape == (1, 1, 4 // world, 1)
    assert mla.kv_b_proj.weight.to_local().shape[0] == 8 // world * 26
    fused, expected = (each.model.layers[1].block_sparse_moe.experts for each in (model, plain))
    assert torch.equal(joined(fused.gate_up_proj), expected.gate_up_proj.cpu())
    same_text(model, plain)
    same_training(model, plain)
    model.save_pretrained(f"{folder}/tensor_{world}")


def expert_parallel(rank: int, world: int, folder: str) -> None:
    name = f"of_{world}"
    if IS_OLD:
        model = load(folder, name, tp_size=world, enable_expert_parallel=True)
    else:
        model = load(folder, name, tp_size=world, ep_size=world)
    plain = load(folder, name)
    experts = model.model.layers[1].block_sparse_moe.experts
    assert experts.gate_up_proj.to_local().shape[0] == 8 // world
    same_text(model, plain)
    same_training(model, plain)
    model.save_pretrained(f"{folder}/expert_{world}")


def tensor_parallel_in_bfloat16(rank: int, world: int, folder: str) -> None:
    """What GPUs compute with; sums of few rounded parts, so all gradients are compared as one."""
    options: Any = {"folder": folder, "name": f"of_{world}", "dtype": torch.bfloat16}
    model, plain = load(**options, tp_plan="auto"), load(**options)
    losses = [each.train()(**packed_rows()).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    grads = [
        torch.cat(
            [whole(parameter.grad).flatten().float().cpu() for parameter in each.parameters()]
        )
        for each in (model, plain)
    ]
    assert (grads[0] - grads[1]).norm() <= 0.1 * grads[1].norm()
    ids = here(token_ids(2, 9))
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        caches = [each(ids[:, :-1], use_cache=True).cache for each in (model, plain)]
        steps = [
            each(ids[:, -1:], cache=cache).logits.float()
            for each, cache in zip((model, plain), caches, strict=True)
        ]
    assert (steps[0] - steps[1]).norm() <= 0.1 * steps[1].norm()


def with_sharded_data(rank: int, world: int, folder: str) -> None:
    """Experts over all processes, the rest by FSDP2 over two, in halves if there are four."""
    name, tp = f"of_{world}", world // 2
    model = load(folder, name, tp_size=tp, fsdp_size=2, ep_size=world)
    same_training(model, load(folder, name), row=rank // tp)
    model.save_pretrained(f"{folder}/data_{world}")


def with_sharded_data_in_bfloat16(rank: int, world: int, folder: str) -> None:
    """The decay parameters are float32, which FSDP gathers by themselves; see above."""
    name, tp = f"of_{world}", world // 2
    plain = load(folder, name, torch.bfloat16)
    model = load(folder, name, torch.bfloat16, tp_size=tp, fsdp_size=2, ep_size=world)
    inputs, row = packed_rows(), rank // tp
    plain.train()(**inputs).loss.backward()
    model.train()(**{key: x[row : row + 1] for key, x in inputs.items()}).loss.backward()
    for end in ("", "A_log", "dt_bias"):
        grads = [
            torch.cat(
                [
                    whole(parameter.grad).flatten().float().cpu()
                    for key, parameter in each.named_parameters()
                    if key.endswith(end)
                ]
            )
            for each in (model, plain)
        ]
        assert (grads[0] - grads[1]).norm() <= 0.1 * grads[1].norm(), end


def pipeline_of_text(rank: int, world: int, folder: str) -> None:
    same_text(load(folder, f"of_{world}", pp_size=world), load(folder, f"of_{world}"))


class Stage(nn.Module):
    """One of two halves of the model, cut as the plan says."""

    def __init__(self, model: Any, is_last: bool) -> None:
        super().__init__()
        self.model, self.is_last = model, is_last
        half = len(model.model.layers) // 2
        model.model.layers = model.model.layers[half:] if is_last else model.model.layers[:half]
        if is_last:
            model.model.embed_tokens = nn.Identity()
        else:
            model.model.norm = model.lm_head = nn.Identity()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        source = "inputs_embeds" if self.is_last else "input_ids"
        return self.model(**{source: x, "position_ids": position_ids, "use_cache": False}).logits


def pipeline_of_training(rank: int, world: int, folder: str) -> None:
    """Two micro-batches of packed rows through torch's GPipe."""
    plain = load(folder, f"of_{world}").train()
    stage = Stage(load(folder, f"of_{world}").train(), is_last=rank == 1)
    inputs = packed_rows()
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    labels = ids.masked_fill(positions == 0, -100)[:, 1:]

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")

    pipeline = PipelineStage(stage, rank, world, device())
    schedule = ScheduleGPipe(pipeline, n_microbatches=2, loss_fn=loss_of, scale_grads=False)
    losses: list[torch.Tensor] = []
    if rank == 0:
        schedule.step(ids, position_ids=positions)
    else:
        schedule.step(position_ids=positions, target=labels, losses=losses)
    expected = loss_of(plain(ids, position_ids=positions).logits, labels)
    expected.backward()
    if rank == 1:
        assert_same(sum(losses), expected.detach(), "loss")
    layers = {f"model.layers.{i}.": f"model.layers.{i + 2 * rank}." for i in range(2)}
    theirs, checked = dict(plain.named_parameters()), 0
    for name, ours in stage.model.named_parameters():
        for own, whole_name in layers.items():
            if name.startswith(own):
                name = name.replace(own, whole_name)
                break
        assert_same(ours.grad, theirs[name].grad, name)
        checked += 1
    assert checked == sum(1 for _ in stage.model.parameters()) > 30


def sizes_must_divide(rank: int, world: int, folder: str) -> None:
    for name, message in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            load(folder, name, tp_size=world)


@register_quantization_config("unchanged")
class Unchanged(QuantizationConfigMixin):
    """Of a quantiser that leaves every weight as it is."""

    def __init__(self) -> None:
        self.quant_method = "unchanged"


@register_quantizer("unchanged")
class UnchangedQuantizer(HfQuantizer):
    is_serializable = is_trainable = requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None: ...

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None: ...

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False


def quantised_weights_are_not_divided(rank: int, world: int, folder: str) -> None:
    """Each process would quantise its part with scales of its own, and saving would fail."""
    packed = dict.fromkeys(("experts", "attention", "head"), {"bits": 8, "group": None})
    for config in (Unchanged(), KimiLinearQuantizationConfig(**packed)):
        for name in ("tp_size", "fsdp_size"):
            with pytest.raises(ValueError, match=f"^{name}={world} is not allowed with quantizat"):
                load(folder, f"of_{world}", quantization=config, **{name: world})
        model = load(folder, f"of_{world}", quantization=config, pp_size=world)
        same_text(model, load(folder, f"of_{world}", quantization=config))


REFUSED = {
    "three_heads": r"num_attention_heads=3 .* over \d processes: it must be a multiple of \d",
    "three_kda_heads": r"linear_attn_config\['num_heads'\]=3 .* it must be a multiple of",
}


@pytest.mark.parametrize("device_type", DEVICE_TYPES)
def test_two_and_four_processes_equal_one(tmp_path: Path, device_type: str):
    """Loss, gradients, text, and the saved files, byte for byte."""
    tiny_model("all_mla").save_pretrained(tmp_path / "three_heads")
    three = {**FIELDS["linear_attn_config"], "num_heads": 3}
    tiny_model(linear_attn_config=three).save_pretrained(tmp_path / "three_kda_heads")
    for world, fields in MODELS.items():
        if not fits(world, device_type):
            continue
        tiny_model(**fields).save_pretrained(tmp_path / f"of_{world}")
        functions = [sizes_must_divide, tensor_parallel, tensor_parallel_in_bfloat16]
        functions += [] if IS_OLD else [with_sharded_data, with_sharded_data_in_bfloat16]
        if world == 2:
            functions += [expert_parallel, pipeline_of_text, pipeline_of_training]
            functions += [quantised_weights_are_not_divided]
        run(world, functions, tmp_path, device_type)
        for file in ("model.safetensors", "config.json", "modeling_kimi_linear.py"):
            expected = (tmp_path / f"of_{world}" / file).read_bytes()
            for path in tmp_path.glob(f"*_{world}"):
                assert (path / file).read_bytes() == expected, path
