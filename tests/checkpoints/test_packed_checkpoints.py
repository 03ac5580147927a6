"""Models with packed weights: saved in the formats of others, and loaded, packed as they were."""

import json
import os

import pytest
import torch
from builders import token_ids
from few_bits_models import MIXED, SCHEMES, adapt, mixed, packed_of, small_model
from remote_code import LOGITS, run_stranger
from safetensors import safe_open
from safetensors.torch import load_file
from stored_checkpoints import change_tensors, official_state
from transformers import AutoConfig, AutoModelForCausalLM

from kimi_linear import (
    KimiLinearBackbone,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    KimiLinearQuantizationConfig,
    quantize_model,
)
from kimi_linear.checkpoints.folders import check_weights
from kimi_linear.checkpoints.names import official_shapes
from kimi_linear.checkpoints.packed import compressed_config
from kimi_linear.configuration_quantization import PARTS
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.upstream.deferred import DeferredTensor

try:
    import compressed_tensors
except ImportError:
    compressed_tensors = None

pytestmark = pytest.mark.core

IDS = token_ids(2, 13)
BLOCKS = SCHEMES["float8 blocks"] | {"rows": 64, "activation_scheme": "dynamic"}
WAYS = {
    "3 bits and 8": MIXED,
    "4 bits, zeros": dict.fromkeys(PARTS, SCHEMES["4 bits, zeros"]),
    "experts alone": {"experts": SCHEMES["3 bits, zeros"]},
    "a row, float8": {
        "experts": SCHEMES["8 bits a row"],
        "attention": SCHEMES["float8"],
        "head": SCHEMES["float8"] | {"group": None},
    },
    "float8 blocks": dict.fromkeys(("experts", "shared_experts", "attention"), BLOCKS),
    "blocks, inputs in 16 bits": dict.fromkeys(
        ("experts", "shared_experts", "attention"), BLOCKS | {"activation_scheme": None}
    ),
    "blocks and a head": {"experts": BLOCKS, "head": SCHEMES["4 bits"]},
}


def packed_model(parts=MIXED, dtype=torch.bfloat16, **fields):
    model = small_model(**fields).to(dtype)
    return quantize_model(model, KimiLinearQuantizationConfig(**parts))


def entry_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def check_same(loaded, model):
    """Tensor by tensor, packed parts and all."""
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert isinstance(found[name], PackedWeights) == isinstance(x, PackedWeights), name
        if not isinstance(x, PackedWeights):
            assert torch.equal(found[name], x), name
            continue
        assert found[name].scheme == x.scheme and found[name].dtype == x.dtype, name
        for part, held in x.parts().items():
            assert torch.equal(found[name].parts()[part], held), f"{name} {part}"
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == set(dict(loaded.named_parameters())) - set(packed_of(loaded))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the folder it was saved to."""
    model, folder = packed_model(), tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_is_loaded(tmp_path, way):
    model = packed_model(WAYS[way])
    model.save_pretrained(tmp_path / "one")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "one")
    check_same(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    entry = compressed_config(KimiLinearQuantizationConfig(**WAYS[way]), model.config)
    assert entry_of(tmp_path / "one") == entry
    assert (entry["quant_method"] == "fp8") == (way == "float8 blocks")
    loaded.save_pretrained(tmp_path / "two")
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two, name
    empty = _on_meta(tmp_path / "one")
    assert check_weights(tmp_path / "one", empty) == official_shapes(empty)


def _on_meta(folder):
    with torch.device("meta"):
        return KimiLinearForCausalLM(KimiLinearConfig.from_pretrained(folder))


def test_names_are_official(saved):
    model, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    stems = {name.rpartition(".")[0] for name in names if name.endswith("weight_packed")}
    expert = "model.layers.1.block_sparse_moe.experts.3"
    assert {f"{expert}.{kind}" for kind in ("w1", "w2", "w3")} < stems and "lm_head" in stems
    with torch.no_grad():
        wide = {name.removesuffix(".weight") for name in official_state(model)}
    plain = {name.removesuffix(".weight") for name in names if name.rpartition(".")[0] not in stems}
    assert stems | plain == wide


@pytest.mark.skipif(compressed_tensors is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "float8 blocks"])
def test_compressed_tensors_reads_the_folder(tmp_path, way):
    """Each matrix is of the group that has it, which reads the same weights."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    model = packed_model(WAYS[way])
    model.save_pretrained(tmp_path)
    config = QuantizationConfig.model_validate(entry_of(tmp_path))
    state, expected = load_file(tmp_path / "model.safetensors"), official_state(model)
    held = {name.rpartition(".")[0] for name in state if name.endswith("weight_scale")}
    assert held
    for stem in {name.removesuffix(".weight") for name in expected}:
        groups = [
            group
            for group in config.config_groups.values()
            if any(match_name(stem, target) for target in group.targets)
        ]
        assert len(groups) == (stem in held), stem
        if groups:
            compressor = BaseCompressor.get_value_from_registry(groups[0].format or config.format)
            parts = {n.rpartition(".")[2]: x for n, x in state.items() if n.startswith(f"{stem}.")}
            read = compressor.decompress(parts, groups[0])["weight"]
            assert torch.equal(read, expected[f"{stem}.weight"]), stem


def test_shards(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 400_000
    assert index["metadata"]["total_size"] < sum(file.stat().st_size for file in files)
    check_same(KimiLinearForCausalLM.from_pretrained(tmp_path), model)
    assert check_weights(tmp_path, _on_meta(tmp_path)) == official_shapes(model)
    model.save_pretrained(tmp_path)  # in its place
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_copies_of_one_shard_are_in_memory(saved, tmp_path, monkeypatch):
    """Each tensor is made right before its file is written."""
    from transformers import modeling_utils

    made, sizes = [], []
    contiguous, write = DeferredTensor.contiguous, modeling_utils.safe_save_file

    def noted(self, *args, **kwargs):
        made.append(contiguous(self))
        return made[-1]

    def written(tensors, *args, **kwargs):
        sizes.append(sum(x.nbytes for x in made))
        made.clear()
        return write(tensors, *args, **kwargs)

    monkeypatch.setattr(DeferredTensor, "contiguous", noted)
    monkeypatch.setattr(modeling_utils, "safe_save_file", written)
    saved[0].save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(sizes) > 3 and 0 < max(sizes) <= 300_000 and not made


def test_a_process_without_the_package(saved, tmp_path):
    model, folder = saved
    script = LOGITS + "    model.save_pretrained(f'{out}/again')\n"
    (results,) = run_stranger(script, [folder], tmp_path)
    ids = load_file(tmp_path / "ids.safetensors")["ids"]
    with torch.no_grad():
        assert torch.equal(results["logits"], model(ids).logits)
    one, two = folder / "model.safetensors", tmp_path / "again" / "model.safetensors"
    assert one.read_bytes() == two.read_bytes() and entry_of(tmp_path / "again") == entry_of(folder)


def test_auto_classes_and_a_configuration_of_ones_own(saved):
    model, folder = saved
    check_same(AutoModelForCausalLM.from_pretrained(folder), model)
    config = AutoConfig.from_pretrained(folder)
    before = config.to_dict()
    assert config.quantization_config == entry_of(folder)
    loaded = KimiLinearForCausalLM.from_pretrained(folder, config=config)
    check_same(loaded, model)
    assert config.to_dict() == before
    assert loaded.config.quantization_config.to_dict() == entry_of(folder)
    again = KimiLinearForCausalLM.from_pretrained(folder, config=loaded.config)
    check_same(again, model)


def test_native_names_load(saved, tmp_path):
    """Dense MLPs as Transformers' own class calls them."""
    model, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def rename(state):
        for name in list(state):
            other = name.replace("layers.0.mlp.", "layers.0.block_sparse_moe.")
            state[other] = state.pop(name)

    change_tensors(tmp_path, rename)
    config = json.loads((tmp_path / "config.json").read_text())
    targets = config["quantization_config"]["config_groups"]["group_1"]["targets"]
    targets.append(r"re:.*\.layers\.0\.block_sparse_moe\.(gate|up|down)_proj$")
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_same(KimiLinearForCausalLM.from_pretrained(tmp_path), model)


def test_dtypes(saved, tmp_path):
    model, folder = saved
    wide = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {x.dtype for x in wide.state_dict().values()} == {torch.float32}
    for name, weights in packed_of(wide).items():
        narrow = weights.dequantized().to(torch.bfloat16)
        assert torch.equal(narrow, packed_of(model)[name].dequantized()), name
    wide.save_pretrained(tmp_path)
    check_same(KimiLinearForCausalLM.from_pretrained(tmp_path), wide)


def test_a_backbone(tmp_path):
    model = packed_model().model
    model.save_pretrained(tmp_path)
    check_same(KimiLinearBackbone.from_pretrained(tmp_path), model)
    entry = entry_of(tmp_path)
    assert entry["config_groups"]["group_1"]["targets"][0] == "embed_tokens"


def test_tied_embeddings(tmp_path):
    model = packed_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_given_state_dict_is_saved(saved, tmp_path):
    model, _ = saved
    some = {name: x for name, x in model.state_dict().items() if "layers.0" not in name}
    del some["lm_head.weight"]
    model.save_pretrained(tmp_path / "some", state_dict=some)
    names = set(load_file(tmp_path / "some" / "model.safetensors"))
    assert names and not any("layers.0." in name or "lm_head" in name for name in names)
    assert all(
        "lm_head" not in str(g) for g in entry_of(tmp_path / "some")["config_groups"].values()
    )
    wide = {n: x.dequantized() for n, x in packed_of(model).items()}
    model.save_pretrained(tmp_path / "wide", state_dict=model.state_dict() | wide)
    assert entry_of(tmp_path / "wide") is None
    plain = KimiLinearForCausalLM.from_pretrained(tmp_path / "wide")
    assert not packed_of(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)
    assert model.config.quantization_config.quant_method == "kimi_linear"


def test_what_is_wide_is_not_called_packed(saved, tmp_path):
    """A model made of a packed checkpoint's configuration, and one that was made wide."""
    _, folder = saved
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    made.save_pretrained(tmp_path / "made")
    wide = KimiLinearForCausalLM.from_pretrained(folder).dequantize()
    wide.save_pretrained(tmp_path / "wide")
    for name in ("made", "wide"):
        assert entry_of(tmp_path / name) is None
        assert not packed_of(KimiLinearForCausalLM.from_pretrained(tmp_path / name))


def test_memory_is_that_of_the_packed_model(saved):
    model, folder = saved
    loaded = KimiLinearForCausalLM.from_pretrained(folder)
    assert loaded.get_memory_footprint() == model.get_memory_footprint()
    quantizer = loaded.hf_quantizer
    for name, p in loaded.named_parameters():
        packed = packed_of(loaded).get(name)
        size = p.element_size() if packed is None else packed.scheme.bits_per_weight(16) / 8
        assert quantizer.param_element_size(loaded, name, p) == size, name
    placed = KimiLinearForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    check_same(placed, model)


@pytest.mark.parametrize("way", ["3 bits and 8", "4 bits, zeros", "float8 blocks"])
@pytest.mark.parametrize("piece", [1, 3 * 128 * 128])
def test_pieces_of_any_size_are_read(tmp_path, monkeypatch, way, piece):
    """Single rows and experts, or several."""
    from kimi_linear.checkpoints import packed_files

    model = packed_model(WAYS[way])
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(packed_files, "PIECE", piece)
    check_same(KimiLinearForCausalLM.from_pretrained(tmp_path), model)


def test_code_is_put_beside_weights_of_others(saved, tmp_path):
    import add_code

    _, folder = saved
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    add_code.main(snapshot=snapshot, output=tmp_path / "ours", check_values=True)
    assert entry_of(tmp_path / "ours") == entry_of(folder)
    change_tensors(snapshot, lambda state: state.pop("lm_head.weight_scale"))
    with pytest.raises(ValueError, match="lm_head.weight_scale is missing"):
        add_code.main(snapshot=snapshot, output=tmp_path / "other")


# ---- what is refused -----------------------------------------------------------------------------


def test_a_checkpoint_is_not_quantised_twice(saved):
    _, folder = saved
    message = "'kimi_linear' is not allowed: .* quantised already, by 'compressed-tensors'"
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(folder, quantization_config=mixed())
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=mixed())
    loaded = KimiLinearForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(loaded, mixed())


def test_adapters_are_not_merged_into_packed_weights(saved):
    pytest.importorskip("peft")
    _, folder = saved
    adapted = adapt(KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32), "dense")
    with pytest.raises(ValueError, match="quantised weights cannot be written to"):
        adapted.merge_and_unload()


def test_our_own_method_is_no_format(saved, tmp_path):
    _, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = mixed().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quant_method='kimi_linear' is not allowed in a check"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)


def test_blocks_of_two_matrices_are_refused(tmp_path):
    parts = {"experts": SCHEMES["float8 blocks"]}
    model = packed_model(parts)
    with pytest.raises(ValueError, match="rows=128 is not allowed: it must divide the 64 rows"):
        model.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


def test_weights_of_a_packed_model_are_not_written_to(saved):
    model = KimiLinearForCausalLM.from_pretrained(saved[1])
    with pytest.raises(ValueError, match="quantised, which is not allowed in load_weights"):
        model.load_weights([("lm_head.weight", torch.zeros(1))])
