"""Packed weights on a GPU: what loading takes, moves, training, models over two of them."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import token_ids
from few_bits_models import adapt, in_full, load_packed, mixed, packed_of, write_small_model
from tolerance import assert_close, assert_kernel_close

from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.quantization import packing

pytestmark = pytest.mark.gpu

IDS = token_ids(2, 40)
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# Large enough for one tensor of experts to stand out: 67 MB, two layers of them.
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "intermediate_size": 512,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


def test_loading_takes_one_wide_tensor_beside_the_packed_model(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """At each tensor, before it is quantised, what is there is packed but for this one."""
    write_small_model(tmp_path, **SIZES)
    held: list[tuple[int, int]] = []
    gc.collect()
    before = torch.cuda.memory_allocated()

    def noted(weights: Any, *args: Any) -> Any:
        held.append((torch.cuda.memory_allocated() - before, weights.nbytes))
        return quantize(weights, *args)

    monkeypatch.setattr(packing, "quantize", noted)
    model = load_packed(tmp_path, mixed(), dtype=torch.bfloat16, device_map="cuda")
    total = model.get_memory_footprint()
    slack = 1 << 20
    assert torch.cuda.memory_allocated() - before < total + slack
    assert max(size for _, size in held) > total / 4
    for taken, size in held:
        assert taken < total + size + slack


def test_moves_and_logits(folder: Path) -> None:
    model = load_packed(folder, mixed(), dtype=torch.bfloat16)
    held = {name: weights.dequantized() for name, weights in packed_of(model).items()}
    model.cuda()
    for name, weights in packed_of(model).items():
        assert weights.is_cuda and all(part.is_cuda for part in weights.parts().values())
        assert torch.equal(weights.dequantized().cpu(), held[name]), name
    direct = load_packed(folder, mixed(), dtype=torch.bfloat16, device_map="cuda")
    plain = in_full(model.cpu(), folder).cuda()
    model.cuda()
    with torch.no_grad():
        expected = plain(IDS.cuda()).logits
        assert_kernel_close(model(IDS.cuda()).logits, expected, torch.bfloat16)
        assert_kernel_close(direct(IDS.cuda()).logits, expected, torch.bfloat16, excess=2)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        assert model.generate(IDS.cuda(), **options, **more).shape[1] > IDS.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_over_the_weights_in_full(folder: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("peft", reason="adapters need PEFT: pip install '.[finetune]'")
    model = load_packed(folder, mixed(), dtype=dtype)
    plain = adapt(in_full(model, folder).cuda(), "all").train()
    model = adapt(model.cuda(), "all").train()
    found = []
    for each in (model, plain):
        each(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
        found.append({n: p.grad for n, p in each.named_parameters() if p.requires_grad})
    for name, expected in found[1].items():
        assert_kernel_close(found[0][name], expected, dtype, name, excess=3)


@TWO
def test_a_model_over_two_gpus(folder: Path) -> None:
    model = load_packed(folder, mixed(), dtype=torch.float32)
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1}
    layers = len(model.model.layers)
    places |= {f"model.layers.{i}": int(2 * i >= layers) for i in range(layers)}
    divided = load_packed(folder, mixed(), device_map=places)
    devices = set()
    for weights in packed_of(divided).values():
        assert all(part.device == weights.device for part in weights.parts().values())
        devices.add(weights.device.index)
    assert devices == {0, 1}
    with torch.no_grad():
        expected = model.to("cuda:0")(IDS.to("cuda:0")).logits
        assert_close(divided(IDS.to("cuda:0")).logits.cpu(), expected.cpu(), torch.bfloat16)
        model.to("cuda:1")  # between devices of one kind, `Module.to` assigns to `data`
        for weights in packed_of(model).values():
            assert {part.device.index for part in weights.parts().values()} == {1}
        assert torch.equal(model(IDS.to("cuda:1")).logits.cpu(), expected.cpu())
