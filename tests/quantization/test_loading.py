"""`from_pretrained(folder, quantization_config=...)`, and `quantize_model` of a model in memory."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import token_ids
from few_bits_models import (
    MIXED,
    everywhere,
    in_full,
    load_packed,
    mixed,
    packed_of,
    small_model,
    write_small_model,
)
from remote_code import run_stranger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from kimi_linear import (
    KimiLinearBackbone,
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearQuantizationConfig,
    quantize_model,
)
from kimi_linear.checkpoints import pretrained
from kimi_linear.checkpoints.files import StoredTensor
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.quantization import packing
from kimi_linear.schemes import BLOCK

pytestmark = pytest.mark.core

IDS = token_ids(2, 21)
PACKED = re.compile(
    r"embed_tokens\.weight|lm_head\.weight|(gate_up|down)_proj|(mlp|shared_experts)\..*\.weight|"
    r"self_attn\.([qkvo]|f_a|g_a)_proj\.weight|kv_a_proj_with_mqa\.weight"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


# ---- what is packed, and how --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_the_parts_are_packed_as_the_configuration_says(folder: Path, dtype: Any) -> None:
    model = load_packed(folder, mixed(), dtype=dtype)
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    stored = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype)
    packed = packed_of(model)
    for name, weights in model.named_parameters():
        assert (name in packed) == bool(PACKED.search(name)), name
        if name not in packed:
            assert torch.equal(weights, stored.get_parameter(name)), name
            continue
        assert isinstance(weights, nn.Parameter) and not weights.requires_grad
        assert weights.dtype == dtype and weights.scheme.bits == (3 if ".experts." in name else 8)
        expected = quantize(stored.get_parameter(name).detach(), weights.scheme)
        assert torch.equal(weights.dequantized(), expected.dequantized()), name
    kinds = {type(module) for module in model.modules()}
    assert {nn.Linear, nn.Embedding, KimiLinearExperts} <= kinds
    assert not any(kind.__name__ == "Arriving" for kind in kinds)


@pytest.mark.parametrize("part", sorted(MIXED))
def test_a_part_alone(folder: Path, part: str) -> None:
    names = packed_of(load_packed(folder, KimiLinearQuantizationConfig(**{part: MIXED[part]})))
    pattern = {
        "experts": r"\.experts\.",
        "shared_experts": r"\.(mlp|shared_experts)\.",
        "attention": r"\.self_attn\.",
        "embeddings": "embed_tokens",
        "head": "lm_head",
    }[part]
    assert names and all(re.search(pattern, name) for name in names)


def test_the_configuration_is_the_models(folder: Path) -> None:
    config = mixed()
    model = load_packed(folder, config)
    assert model.is_quantized and model.config.quantization_config is config
    assert model.quantization_method == model.hf_quantizer.quantization_config.quant_method
    stored = json.loads(model.config.to_json_string())["quantization_config"]
    assert stored["quant_method"] == "kimi_linear" and stored["experts"]["bits"] == 3
    assert KimiLinearQuantizationConfig.from_dict(stored).to_dict() == config.to_dict()


def test_float8_blocks_by_name() -> None:
    config = KimiLinearQuantizationConfig(experts="fp8", attention="fp8w")
    fields = {"bits": 8, "group": 128, "is_float": True, "rows": 128}
    again = KimiLinearQuantizationConfig(
        experts=fields | {"activation_scheme": "dynamic"}, attention=fields
    )
    assert config.to_dict() == again.to_dict()
    with pytest.raises(
        ValueError, match="experts='fp4' is not allowed: it must be 'fp8' or 'fp8w'"
    ):
        KimiLinearQuantizationConfig(experts="fp4")


@pytest.mark.parametrize("form", ["object", "dict"])
@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}, "cpu"])
def test_the_ways_to_ask_for_it(folder: Path, form: str, device_map: Any) -> None:
    config = mixed()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config if form == "object" else config.to_dict(),
        device_map=device_map,
        dtype=torch.float32,
    )
    expected = load_packed(folder, config)
    assert len(packed_of(model)) == len(packed_of(expected)) > 0
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_other_heads_and_no_head(folder: Path) -> None:
    """A new head stays as it is; a backbone's names lack the prefix."""
    options = {"quantization_config": mixed(), "dtype": torch.float32}
    backbone = KimiLinearBackbone.from_pretrained(folder, **options)
    classifier = KimiLinearForSequenceClassification.from_pretrained(
        folder, num_labels=3, **options
    )
    names = {name for name in packed_of(load_packed(folder, mixed())) if "lm_head" not in name}
    assert set(packed_of(classifier)) == names == {f"model.{name}" for name in packed_of(backbone)}
    assert type(classifier.score.weight) is nn.Parameter
    assert classifier(IDS).logits.shape == (2, 3)


def test_what_the_checkpoint_lacks_is_packed_too(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model, info = load_packed(tmp_path, mixed(), output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert isinstance(model.lm_head.weight, PackedWeights)
    assert model.lm_head.weight.dequantized().std() > 0


@pytest.mark.parametrize("source", ["state dict", "other file", "torch file"])
def test_weights_from_elsewhere(folder: Path, tmp_path: Path, source: str) -> None:
    """They are the caller's: what is packed is not taken from them."""
    expected = load_packed(folder, mixed())
    if source == "state dict":
        state = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        before = copy.deepcopy(state)
        config = AutoConfig.from_pretrained(folder)
        model = KimiLinearForCausalLM.from_pretrained(
            None, config=config, state_dict=state, quantization_config=mixed(), dtype=torch.float32
        )
        assert all(torch.equal(state[name], x) for name, x in before.items())
    else:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        if source == "torch file":
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        else:  # fused experts in 8 bits, which Transformers reads
            tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
            save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = load_packed(tmp_path, mixed())
    for name, weights in packed_of(expected).items():
        assert torch.equal(packed_of(model)[name].dequantized(), weights.dequantized()), name


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_wide_at_a_time(folder: Path, monkeypatch: Any, dtype: torch.dtype) -> None:
    """When a tensor is read, those that were packed before it are there no more."""
    read = StoredTensor.__getitem__
    arrived: list[Any] = []
    wide: list[int] = []

    def noted_read(self: StoredTensor, index: Any) -> Tensor:
        wide.append(sum(storage.nbytes() for storage in arrived))
        return read(self, index)

    def noted_quantize(weights: Tensor, *args: Any) -> PackedWeights:
        arrived.append(weights.untyped_storage())
        assert sum(storage.nbytes() > 0 for storage in arrived) == 1
        return quantize(weights, *args)

    monkeypatch.setattr(StoredTensor, "__getitem__", noted_read)
    monkeypatch.setattr(packing, "quantize", noted_quantize)
    model = load_packed(folder, mixed(), dtype=dtype)
    assert len(arrived) == len(packed_of(model)) > 0
    assert len(wide) > len(arrived) and not any(wide)


def test_the_footprint_is_what_is_held(folder: Path) -> None:
    model = load_packed(folder, mixed(), dtype=torch.bfloat16)
    held = sum(weights.held_bytes() for weights in packed_of(model).values())
    others = [p for name, p in model.named_parameters() if name not in packed_of(model)]
    rest = sum(p.numel() * p.element_size() for p in others)
    assert model.get_memory_footprint(return_buffers=False) == held + rest
    for name, weights in packed_of(model).items():
        bits = weights.scheme.bits_per_weight(16)
        num_inputs = weights.shape[-1]
        numbers = weights.numel() / num_inputs * (num_inputs + -num_inputs % BLOCK)
        assert 8 * weights.held_bytes() <= bits * numbers, name


def test_a_map_of_devices_counts_packed_weights(folder: Path) -> None:
    model = load_packed(folder, mixed(), dtype=torch.bfloat16)
    sizes = {
        name: model.hf_quantizer.param_element_size(model, name, p)
        for name, p in model.named_parameters()
    }
    assert sizes["model.layers.1.block_sparse_moe.experts.gate_up_proj"] == 3.25 / 8
    assert sizes["lm_head.weight"] == 8.25 / 8 and sizes["model.norm.weight"] == 2
    assert {name for name, size in sizes.items() if size < 2} == set(packed_of(model))


# ---- tied embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loading", "in memory"])
def test_tied_embeddings_are_one_packed_tensor(tmp_path: Path, way: str) -> None:
    write_small_model(tmp_path, tie_word_embeddings=True)
    if way == "loading":
        model = load_packed(tmp_path, mixed())
    else:
        model = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        quantize_model(model, mixed())
    assert isinstance(model.lm_head.weight, PackedWeights)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = in_full(model, tmp_path)
    with torch.no_grad():
        assert_close(model(IDS).logits, plain(IDS).logits, torch.float32)
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head.weight) is nn.Parameter
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_tied_embeddings_of_one_memory(tmp_path: Path) -> None:
    """A torch file's two names share theirs, which must not go with the first."""
    write_small_model(tmp_path, tie_word_embeddings=True)
    expected = load_packed(tmp_path, mixed())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load_packed(tmp_path, mixed())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_tied_embeddings_held_in_two_ways_are_refused(tmp_path: Path) -> None:
    write_small_model(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="head=None is not allowed with tie_word_embeddings=True"):
        load_packed(tmp_path, mixed(head=None))


# ---- in memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_memory_becomes_what_loading_makes(folder: Path, dtype: torch.dtype) -> None:
    loaded = load_packed(folder, mixed(), dtype=dtype)
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype)
    assert quantize_model(model, mixed()) is model
    assert model.is_quantized and model.quantization_method == loaded.quantization_method
    assert model.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert model.get_memory_footprint() == loaded.get_memory_footprint()
    assert packed_of(model).keys() == packed_of(loaded).keys()
    for name, weights in packed_of(loaded).items():
        assert torch.equal(packed_of(model)[name].dequantized(), weights.dequantized()), name


def test_what_cannot_be_quantised_in_memory(folder: Path) -> None:
    model = small_model()
    model.model.layers[2].self_attn.q_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj\.weight has numbers that"):
        quantize_model(model, mixed())
    assert not packed_of(model) and not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    with pytest.raises(ValueError, match="must be a KimiLinearQuantizationConfig"):
        quantize_model(small_model(), None)
    with pytest.raises(ValueError, match="quantised already, by 'kimi_linear'; dequantize"):
        quantize_model(load_packed(folder, mixed()), mixed())
    model = small_model().to("meta")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is on the meta device"):
        quantize_model(model, mixed())


def test_adapters_come_after(folder: Path) -> None:
    pytest.importorskip("peft", reason="adapters need PEFT: pip install '.[finetune]'")
    from few_bits_models import adapt

    adapted = adapt(small_model(), "attention")
    with pytest.raises(
        ValueError, match="q_proj is a Linear, which cannot be quantised: .* before"
    ):
        quantize_model(adapted.base_model.model, mixed())


STRANGER_IN_FEW_BITS = """
import json
config = json.loads(open(f"{out}/quantization.json").read())
for number, folder in enumerate(folders):
    model, info = load(
        AutoModelForCausalLM, folder, quantization_config=config, dtype=torch.float32)
    assert model.is_quantized and not info["missing_keys"], info
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, f"{out}/results-{number}.safetensors")
"""
BOTH_IN_FEW_BITS = """
import json
from transformers.dynamic_module_utils import get_class_from_dynamic_module
import kimi_linear
config = json.loads(open(f"{out}/quantization.json").read())
config = kimi_linear.KimiLinearQuantizationConfig(**config)
for number, folder in enumerate(folders):
    name = "modeling_kimi_linear.KimiLinearForCausalLM"
    other = get_class_from_dynamic_module(name, folder)
    assert other is not kimi_linear.KimiLinearForCausalLM
    logits = []
    for kind in (other, kimi_linear.KimiLinearForCausalLM, other):
        model = kind.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        assert model.is_quantized and type(model.lm_head.weight).__name__ == "PackedWeights"
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    save_file({"logits": logits[0]}, f"{out}/results-{number}.safetensors")
"""


@pytest.mark.parametrize("installed", [False, True])
def test_code_beside_weights_does_the_same(folder: Path, tmp_path: Path, installed: bool) -> None:
    """Also beside the package, which has registered under the same name."""
    (tmp_path / "quantization.json").write_text(json.dumps(mixed().to_dict()))
    script = BOTH_IN_FEW_BITS if installed else STRANGER_IN_FEW_BITS
    (found,) = run_stranger(script, [folder], tmp_path, installed=installed)
    with torch.no_grad():
        expected = load_packed(folder, mixed())(token_ids(2, 13)).logits
    assert_close(found["logits"], expected, torch.float32)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mixed(attention={"bits": 4, "group": 96}), r"q_proj\.weight: group=96 .* the 128 inputs"),
        (mixed(experts={"bits": 3, "group": 128}), r"experts\.down_proj: group=128 .* 64 inputs"),
        (KimiLinearQuantizationConfig.from_preset("24gb"), r"down_proj\.weight: group=128 .* 192"),
    ],
)
def test_groups_that_do_not_fit_are_named_first(
    folder: Path, monkeypatch: Any, config: Any, message: str
) -> None:
    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(pretrained, "stored_tensors", read)
    with pytest.raises(ValueError, match=message):
        load_packed(folder, config)
    model = small_model()
    with pytest.raises(ValueError, match=message):
        quantize_model(model, config)
    assert not packed_of(model) and not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("found", ["kimi_linear", "compressed-tensors", "fp8", "unknown"])
@pytest.mark.parametrize("auto", [False, True])
def test_what_is_quantised_is_not_quantised_again(
    folder: Path, tmp_path: Path, found: str, auto: bool
) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": found}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    kind = AutoModelForCausalLM if auto else KimiLinearForCausalLM
    message = f"of 'kimi_linear' is not allowed: .* is quantised already, by '{found}'"
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path, quantization_config=mixed())
    if found == "kimi_linear":
        config = BitsAndBytesConfig(load_in_8bit=True)
        with pytest.raises(ValueError, match="of 'bitsandbytes' is not allowed: .* 'kimi_linear'"):
            kind.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "cpu", "lm_head": 0}])
def test_packed_weights_are_not_offloaded(folder: Path, places: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="device_map with '(disk|cpu)' beside other devices is not"
    ):
        load_packed(folder, mixed(), device_map=places, offload_folder="nowhere")


def test_other_models_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=64, **sizes))
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with LlamaForCausalLM: it is for Kimi Linear models"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=mixed())


def test_weights_that_are_not_finite_are_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name][2, 3] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"layers\.1\..*experts\.down_proj\[3\] has numbers"):
        load_packed(tmp_path, mixed())


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_another_shape_are_named(folder: Path, tmp_path: Path, file: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-8].contiguous()
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises((ValueError, RuntimeError), match="q_proj|ignore_mismatched_sizes"):
        load_packed(tmp_path, mixed())


# ---- back to wide weights -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_dequantised_model_is_plain_and_saves(
    folder: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    model = load_packed(folder, everywhere("4 bits"))
    expected = in_full(model, folder)
    assert model.dequantize(dtype=dtype) is model
    assert not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    wide = [name for name in expected.state_dict() if not name.endswith(("A_log", "dt_bias"))]
    for name, weights in model.named_parameters():
        assert type(weights) is nn.Parameter and weights.requires_grad, name
        kept = name not in wide
        assert weights.dtype == (dtype if dtype and not kept else torch.float32), name
        assert torch.equal(weights, expected.get_parameter(name).to(weights.dtype)), name
    model.save_pretrained(tmp_path)
    files = [safe_open(each / "model.safetensors", "pt") for each in (tmp_path, folder)]
    assert set(files[0].keys()) == set(files[1].keys())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    quantize_model(model, mixed())  # and once more
