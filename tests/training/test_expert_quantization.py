"""Experts in 4 and 8 bits: what they compute, what they take, what they refuse; QLoRA on them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model, token_ids
from safetensors import safe_open
from tolerance import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops.experts.quantized import QuantizedExperts, _moved
from kimi_linear.ops.quantized import has_quantized
from kimi_linear.training.lora import lora_targets

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[qlora]'")

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("cpu")]

IDS = token_ids(2, 21)
CONFIGS: dict[int, dict[str, Any]] = {
    4: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    8: {"load_in_8bit": True},
}
# Largest error relative to the largest weight of its block: NF4's widest gap is 0.3. Bits a number,
# scales included.
ERRORS, BITS = {4: 0.16, 8: 0.04}, {4: 4.6, 8: 8.3}


class WholeBlocksOnly(TorchDispatchMode):
    """Refuses to have weights unpacked that bitsandbytes' kernel for AVX512 unpacks wrongly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if func.namespace == "bitsandbytes" and "4bit" in func._schema.name:
            shape = given.get("shape", given.get("shapeB"))
            if shape is not None and len(shape) > 1 and shape[0] > 1:
                assert shape[-1] % given["blocksize"] == 0, (func, shape)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["any_cpu", "avx512_bf16"])
def cpu(request: Any, monkeypatch: Any) -> Iterator[None]:
    """What bitsandbytes finds out about the CPU, on which its ways depend."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: request.param)
    with WholeBlocksOnly():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("alternating", hidden_size=64, moe_intermediate_size=48).save_pretrained(folder)
    return folder


def load(
    folder: Path, bits: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> KimiLinearForCausalLM:
    config = BitsAndBytesConfig(**{**CONFIGS[bits], **changes})
    return KimiLinearForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype
    ).eval()


def experts_of(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name}


@torch.no_grad()
def unquantised(model: Any, folder: Path) -> KimiLinearForCausalLM:
    """A plain model with the weights that a model in 4 bits computes with."""
    plain = KimiLinearForCausalLM.from_pretrained(folder).eval()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.copy_(weight)
    for name, weights in experts_of(model).items():
        assert isinstance(weights, QuantizedExperts)
        plain.get_parameter(name).copy_(weights.dequantized())
    return plain


def adapt(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="adapters need PEFT: pip install '.[finetune]'")
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **lora_targets(model.config, "all"))
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


# ---- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_near_and_small(bits: int, dtype: torch.dtype) -> None:
    weights = torch.randn(6, 96, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = QuantizedExperts.of(weights, bits, double_quant=True)
    assert (packed.shape, packed.dtype) == (weights.shape, dtype)
    blocks = weights.double().reshape(-1, 64)
    errors = (packed.dequantized().double().reshape(-1, 64) - blocks).abs().amax(1)
    assert (errors / blocks.abs().amax(1)).max() < ERRORS[bits]
    state = [packed.state, getattr(packed.state, "state2", None)]
    scales = [each.absmax for each in state if each is not None]
    taken = sum(x.numel() * x.element_size() for x in (packed.codes, *scales))
    assert 8 * taken / weights.numel() < BITS[bits]


@pytest.mark.parametrize("shape", [(3, 8, 48), (3, 5, 48), (3, 5, 7)])
def test_rows_need_not_be_whole_blocks(shape: tuple[int, ...]) -> None:
    """bitsandbytes' kernel for CPUs with AVX512 took other blocks' scales for them."""
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    weights *= torch.logspace(-3, 3, weights.numel()).reshape(shape)  # no block's scale fits others
    found = QuantizedExperts.of(weights, 4).dequantized()
    for block, expected in zip(found.flatten().split(64), weights.flatten().split(64), strict=True):
        assert (block - expected).abs().max() < ERRORS[4] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_of_any_size(folder: Path, dtype: torch.dtype) -> None:
    """4 bits where rows are whole blocks, whatever the number of rows; the rest stays wide."""
    model = load(folder, 4, dtype=dtype)
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    packed = [m for m in linears if isinstance(m, bnb.nn.Linear4bit)]
    wide = [m for m in linears if type(m) is nn.Linear]
    assert any(m.out_features % 32 for m in packed) and not any(m.in_features % 64 for m in packed)
    assert wide and all(m.in_features % 64 and m.weight.dtype == dtype for m in wide)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_a_quantised_model_computes_what_its_weights_say(folder: Path, experts: str) -> None:
    model = load(folder, 4)
    assert len(experts_of(model)) == 6 and has_quantized(model, QuantizedExperts)
    plain = unquantised(model, folder)
    for each in (model, plain):
        each.set_experts_implementation(experts)
    with torch.no_grad():
        assert_close(model(IDS).logits, plain(IDS).logits, torch.float32)
    ids = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, plain.generate(IDS, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_adapters_over_quantised_experts_get_their_gradients(folder: Path, experts: str) -> None:
    """As over the same weights in full, and again after a step: nothing piles up on the way.

    Also after an evaluation, which made bitsandbytes' layers lose theirs on CPUs with AVX512-BF16.
    """
    model = load(folder, 4)
    plain = adapt(unquantised(model, folder)).train()
    model = adapt(model).train()
    for each in (model, plain):
        each.base_model.model.set_experts_implementation(experts)
        with torch.no_grad():
            each.eval()(IDS)
        each.train()
    for _ in range(2):
        found = []
        for each in (model, plain):
            loss = each(input_ids=IDS, labels=IDS).loss
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in each.named_parameters() if p.requires_grad}
            found.append((loss.detach(), gradients))
            with torch.no_grad():
                for parameter in each.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad
            each.zero_grad()
        (loss, ours), (expected_loss, theirs) = found
        assert_close(loss, expected_loss, torch.float32)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert expected.abs().max() > 0, name
            torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-6, msg=name)
    assert all(
        isinstance(p, QuantizedExperts) for n, p in experts_of(model).items() if "lora" not in n
    )


def test_the_backward_pass_keeps_the_packed_form(folder: Path) -> None:
    model = load(folder, 4)
    model.set_experts_implementation("grouped_mm")
    layer = model.model.layers[1].block_sparse_moe.train()
    kept: list[Tensor] = []
    x = torch.randn(1, 9, 64, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer.experts(x[0], *reversed(layer.gate(x[0])[1:]))
    fused = [tensor for tensor in kept if tensor.ndim == 3]
    assert len(fused) == 2 and all(isinstance(tensor, QuantizedExperts) for tensor in fused)
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_8_bits_are_near_the_model(folder: Path) -> None:
    model, plain = load(folder, 8), KimiLinearForCausalLM.from_pretrained(folder).eval()
    for name, weights in experts_of(model).items():
        assert isinstance(weights, QuantizedExperts) and weights.bits == 8
        error = (weights.dequantized() - plain.get_parameter(name)).norm()
        assert error < 0.02 * plain.get_parameter(name).norm(), name
    with torch.no_grad():
        error = (model(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
    assert error < 0.3


# ---- loading ------------------------------------------------------------------------------------


def test_experts_are_packed_as_they_arrive(folder: Path, monkeypatch: Any) -> None:
    """Never two tensors of experts in full at a time."""
    original, full = QuantizedExperts.of.__func__, []
    models: list[Any] = []
    init = KimiLinearForCausalLM.__init__

    def noted_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        models.append(self)

    def noted(cls: Any, weights: Tensor, *args: Any) -> QuantizedExperts:
        arrived = [p for p in experts_of(models[0]).values() if not p.is_meta]
        full.append(sum(not isinstance(p, QuantizedExperts) for p in arrived))
        return original(cls, weights, *args)

    monkeypatch.setattr(KimiLinearForCausalLM, "__init__", noted_init)
    monkeypatch.setattr(QuantizedExperts, "of", classmethod(noted))
    model = load(folder, 4)
    assert full == [0] * 6
    assert sum(type(module) is KimiLinearExperts for module in model.modules()) == 3


def test_experts_that_are_to_be_left_alone_are(folder: Path) -> None:
    model = load(folder, 4, llm_int8_skip_modules=["experts", "lm_head"])
    assert not has_quantized(model, QuantizedExperts)
    assert all(type(p) is nn.Parameter for p in experts_of(model).values())


# ---- what it takes, and back to wide weights ----------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_the_memory_footprint_is_that_of_the_packed_form(folder: Path, bits: int) -> None:
    model = load(folder, bits)
    experts = experts_of(model)
    others = [p for n, p in model.named_parameters() if n not in experts]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    taken = model.get_memory_footprint() - buffers
    assert model.get_memory_footprint(return_buffers=False) == taken
    taken -= sum(p.numel() * p.element_size() for p in others)
    numbers, tables = sum(p.numel() for p in experts.values()), 6 * 4 * (256 + 16 + 1)
    assert bits * numbers < 8 * taken < BITS[bits] * numbers + 8 * tables


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantised_model_is_plain_and_saves(
    folder: Path, tmp_path: Path, bits: int, dtype: torch.dtype | None
) -> None:
    model = load(folder, bits)
    with torch.no_grad():
        expected = model(IDS).logits
    packed = {name: weights.dequantized() for name, weights in experts_of(model).items()}
    assert model.dequantize(dtype=dtype) is model
    assert not has_quantized(model, QuantizedExperts) and all(
        type(p) is nn.Parameter for p in model.parameters()
    )
    for name, weights in experts_of(model).items():
        assert weights.dtype == (dtype or torch.float32) and weights.requires_grad
        assert torch.equal(weights, packed[name].to(weights.dtype))
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(tmp_path)
    files = [safe_open(each / "model.safetensors", "pt") for each in (tmp_path, folder)]
    assert set(files[0].keys()) == set(files[1].keys())
    again = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=dtype or torch.float32).eval()
    with torch.no_grad():
        found = again(IDS).logits
        assert torch.equal(found, model(IDS).logits)
    if dtype is None and bits == 4:  # in 8 bits, bitsandbytes quantises the inputs too
        assert_close(found, expected, torch.float32)


# ---- moves and refusals -------------------------------------------------------------------------


def test_moves_keep_the_packed_form() -> None:
    weights = torch.randn(2, 32, 64)
    packed = QuantizedExperts.of(weights, 4, double_quant=True)
    module = nn.Module()
    module.weight = nn.Parameter(packed, requires_grad=False)
    module.to(torch.bfloat16)
    assert isinstance(module.weight, QuantizedExperts) and module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight.dequantized(), packed.dequantized().bfloat16())
    state = _moved(packed.state, torch.device("cpu"))
    assert state is not packed.state and state.state2 is not packed.state.state2
    again = QuantizedExperts(packed.codes, state, 4, packed.shape, packed.dtype)
    assert torch.equal(again.dequantized(), packed.dequantized())
    assert torch.equal(packed + 1, packed.dequantized() + 1)
    with pytest.raises(ValueError, match="bits=3 is not allowed"):
        QuantizedExperts.of(weights, 3)


@pytest.mark.parametrize("safe", [False, True])
def test_what_would_lose_adapters_is_refused(folder: Path, safe: bool, tmp_path: Path) -> None:
    model = load(folder, 4)
    with pytest.raises(ValueError, match="quantised experts cannot be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights are quantised, which is not allowed in load_w"):
        model.load_weights([])
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be written to"):
        next(iter(experts_of(model).values())).mul_(2)
    with pytest.raises(ValueError, match="cannot be written to: load the model without"):
        adapt(model).merge_and_unload(safe_merge=safe)


def test_adapters_of_a_quantised_model_serve_both(folder: Path, tmp_path: Path) -> None:
    """They reload over the quantised model to the same bits, and merge into the plain one."""
    peft = pytest.importorskip("peft", reason="adapters need PEFT: pip install '.[finetune]'")
    model = adapt(load(folder, 4)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    again = peft.PeftModel.from_pretrained(load(folder, 4), tmp_path / "adapter").eval()
    base = KimiLinearForCausalLM.from_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        expected = plain(IDS).logits
        assert_close(plain.merge_and_unload()(IDS).logits, expected, torch.float32)
