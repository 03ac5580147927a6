"""What a packed model computes on a CPU: that of the same model with its weights in full."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import token_ids
from few_bits_models import (
    SCHEMES,
    everywhere,
    in_full,
    load_packed,
    mixed,
    packed_of,
    write_small_model,
)
from tolerance import assert_close
from torch import nn

from kimi_linear.cache.pieces import READ_TOKENS, read_tokens
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.quantized import QuantizedTensor
from kimi_linear.schemes import Scheme

pytestmark = pytest.mark.core

IDS = token_ids(2, 21)
EXPERTS = ("eager", "grouped_mm", "batched_mm")
GREEDY: dict[str, Any] = {
    "max_new_tokens": 10,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Any, Any]:
    """A packed model, and the same in full."""
    model = load_packed(folder, mixed())
    return model, in_full(model, folder)


@torch.no_grad()
def test_a_cpu_s_caches_do_not_cut_what_a_packed_model_reads(models):
    """Every piece would unpack the weights again."""
    (packed, full), call = models, (1, READ_TOKENS)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert read_tokens(packed, call, cpu) == read_tokens(full, call, gpu) == READ_TOKENS
    assert read_tokens(full, call, cpu) < READ_TOKENS


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_logits_are_those_of_the_weights_in_full(folder: Path, scheme: str, experts: str) -> None:
    model = load_packed(folder, everywhere(scheme))
    plain = in_full(model, folder)
    assert len(packed_of(model)) > 30
    for each in (model, plain):
        each.set_experts_implementation(experts)
    expected = plain(IDS).logits
    assert_close(model(IDS).logits, expected, torch.float32)
    # padded, behind a cache, and from states
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    assert_close(
        model(IDS, attention_mask=mask).logits,
        plain(IDS, attention_mask=mask).logits,
        torch.float32,
    )
    cache = model(IDS[:, :13], use_cache=True).cache
    behind = model(IDS[:, 13:], cache=cache).logits
    assert_close(behind, expected[:, 13:], torch.float32)


@torch.no_grad()
def test_logits_in_16_bits(folder: Path) -> None:
    model = load_packed(folder, mixed(), dtype=torch.bfloat16)
    assert_close(model(IDS).logits, in_full(model, folder)(IDS).logits, torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
def test_generate(models: tuple[Any, Any], mode: str) -> None:
    found, expected = (
        each.generate(IDS[:1] if mode == "prompt lookup" else IDS, **{**GREEDY, **MODES[mode]})
        for each in models
    )
    assert torch.equal(found, expected)


def test_packed_models_draft_and_check(models: tuple[Any, Any]) -> None:
    model, plain = models
    expected = plain.generate(IDS[:1], **GREEDY)
    for main, draft in ((model, plain), (plain, model), (model, copy.deepcopy(model))):
        assert torch.equal(main.generate(IDS[:1], assistant_model=draft, **GREEDY), expected)


def test_packed_rows_do_not_see_each_other(models: tuple[Any, Any]) -> None:
    model, plain = models
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None].expand(2, -1)
    with torch.no_grad():
        found, expected = (each(IDS, position_ids=positions).logits for each in models)
    assert_close(found, expected, torch.float32)


# ---- moves and copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Computations see the weights in it; decay parameters stay in float32 beside 16 bits."""
    model = load_packed(folder, mixed())
    before = {name: weights.dequantized() for name, weights in packed_of(model).items()}
    held = model.get_memory_footprint(return_buffers=False)
    moved = model.half() if dtype == torch.float16 else model.to(dtype)
    assert moved is model and model.is_quantized and model.dtype == dtype
    for name, weights in packed_of(model).items():
        assert weights.dtype == dtype
        exact = min(dtype, torch.float32, key=lambda each: each.itemsize)
        assert_close(weights.dequantized(), before[name], exact, name)
    if dtype.itemsize == 2:
        assert model.get_memory_footprint(return_buffers=False) < held
        assert model.model.layers[0].self_attn.A_log.dtype == torch.float32
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    assert model(IDS).logits.isfinite().all()
    model.float()
    assert {weights.dtype for weights in packed_of(model).values()} == {torch.float32}
    for name, weights in packed_of(model).items():
        assert torch.equal(weights.dequantized(), before[name]), name


def test_another_device(folder: Path) -> None:
    model = load_packed(folder, mixed())
    names = set(packed_of(model))
    model.to("cpu")
    assert set(packed_of(model)) == names
    model.to("meta")
    assert all(
        part.is_meta for weights in packed_of(model).values() for part in weights.parts().values()
    )


def test_what_is_assigned_to_data_is_held() -> None:
    """`Module.to` assigns between two GPUs, and left the codes on the first one."""
    packed = [quantize(torch.randn(4, 64), Scheme(4, 64)) for _ in range(2)]
    first, second = (nn.Parameter(each, requires_grad=False) for each in packed)
    expected = second.dequantized()
    first.data = second
    assert isinstance(first, nn.Parameter) and torch.equal(first.dequantized(), expected)


def test_a_copy_is_a_model_of_its_own(models: tuple[Any, Any]) -> None:
    model, _ = models
    copied = copy.deepcopy(model)
    assert packed_of(copied).keys() == packed_of(model).keys()
    assert all(isinstance(weights, nn.Parameter) for weights in packed_of(copied).values())
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, model(IDS).logits)
    copied.dequantize()
    assert model.is_quantized and packed_of(model)


# ---- refusals -----------------------------------------------------------------------------------


def test_packed_weights_are_not_written_to(models: tuple[Any, Any], tmp_path: Path) -> None:
    model, plain = models
    with pytest.raises(ValueError, match="weights are quantised, which is not allowed in load_w"):
        model.load_weights([])
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be written to: load the model"):
        model.lm_head.weight.mul_(2)
    with pytest.raises((ValueError, RuntimeError), match="cannot be written to"):
        model.load_state_dict(plain.state_dict())


def test_packed_weights_are_not_divided(folder: Path) -> None:
    """Without a process group: the refusal comes first."""

    class Config:
        tp_size, ep_size, fsdp_size, dp_replicate_size = 2, 1, 1, 1

    model = load_packed(folder, mixed())
    with pytest.raises(ValueError, match="^tp_size=2 is not allowed with quantization_config"):
        type(model).maybe_distribute_model(model, Config(), None)


def test_every_reader_of_a_weight_sees_it_in_full(models: tuple[Any, Any]) -> None:
    """Packed weights in any operation, not only in products."""
    model, plain = models
    for name, weights in packed_of(model).items():
        expected = plain.get_parameter(name).detach()
        assert isinstance(weights, QuantizedTensor) and isinstance(weights, PackedWeights)
        assert torch.equal(weights + 0, expected) and torch.equal(weights.float(), expected + 0)
        assert torch.equal(weights.mT + 0, expected.mT) and weights.norm() == expected.norm(), name
