"""Checkpoints in few bits that others made: read as they are, unexpanded."""

import copy

import pytest
import torch
from builders import tiny_model, token_ids
from stored_checkpoints import (
    FP8,
    SIZES,
    change_tensors,
    float_quantized,
    floats,
    integers,
    official_state,
    pack_quantized,
    packed_names,
    set_entry,
    write_stored,
)

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.checkpoints.names import official_shapes
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import NAMED, Scheme

pytestmark = pytest.mark.core

SMALL = ("f_b_proj", "g_b_proj", ".b_proj", "kv_b_proj")  # the model has them in 16 bits
Q_PROJ = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.1.block_sparse_moe.experts"


def is_linear(stem):
    return not stem.endswith(("embed_tokens", "lm_head", ".gate"))


def linear_in(make, **how):
    return lambda stem, weight: make(weight, **how) if is_linear(stem) else None


def check_loaded(folder, expected, scheme, *, kept=None):
    """The weights are those, packed where the model holds them so."""
    model = KimiLinearForCausalLM.from_pretrained(folder)
    read = official_state(model)
    assert read.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(read[name], x), name
    packed = packed_names(model)
    if kept is None:
        linear = {n for n, x in model.state_dict().items() if x.dim() >= 2 and is_matrix(n)}
        kept = {n for n in linear if not n.removesuffix(".weight").endswith(SMALL)}
    assert packed == kept
    schemes = {x.scheme for x in model.state_dict().values() if isinstance(x, PackedWeights)}
    assert schemes == {scheme}
    return model


def is_matrix(name):
    return "_proj" in name and is_linear(name.removesuffix(".weight"))


INTEGERS = {
    "4 bits in 128": (4, 128, True),
    "4 bits in 32, zeros": (4, 32, False),
    "4 bits a row": (4, None, True),
    "4 bits a row, zeros": (4, None, False),
    "8 bits in 64": (8, 64, True),
    "8 bits in 128, zeros": (8, 128, False),
    "3 bits in 32": (3, 32, True),
}


@pytest.mark.parametrize(("bits", "group", "symmetric"), INTEGERS.values(), ids=INTEGERS)
def test_integers(tmp_path, bits, group, symmetric):
    strategy = "channel" if group is None else "group"
    entry = pack_quantized(num_bits=bits, group_size=group, strategy=strategy, symmetric=symmetric)
    hold = linear_in(integers, bits=bits, group=group, symmetric=symmetric)
    expected = write_stored(tmp_path / "it", entry, hold)
    model = check_loaded(tmp_path / "it", expected, Scheme(bits, group, is_symmetric=symmetric))
    wide = tiny_model(**SIZES).to(torch.bfloat16)
    wide.load_weights(expected.items(), strict=True)
    ids = token_ids(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wide(ids).logits)


A_ROW = Scheme(8, None, is_float=True, activation_scheme="dynamic")


def test_float8_a_row(tmp_path):
    expected = write_stored(tmp_path / "it", float_quantized(), linear_in(floats))
    check_loaded(tmp_path / "it", expected, A_ROW)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_float8_with_one_scale(tmp_path, shape):
    def hold(stem, weight):
        if not is_linear(stem):
            return None
        parts, wide = floats(weight, "tensor")
        return parts | {"weight_scale": parts["weight_scale"].view(shape)}, wide

    expected = write_stored(tmp_path / "it", float_quantized(strategy="tensor"), hold)
    check_loaded(tmp_path / "it", expected, A_ROW)


BLOCK = Scheme(**NAMED["fp8"])


def test_float8_blocks_of_compressed_tensors(tmp_path):
    entry = float_quantized(strategy="block", block_structure=[128, 128])
    expected = write_stored(tmp_path / "it", entry, linear_in(floats, strategy="block"))
    model = check_loaded(tmp_path / "it", expected, BLOCK)
    assert model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight.shape[0] == 136


def test_deepseeks_blocks(tmp_path):
    hold = linear_in(floats, strategy="block", name="weight_scale_inv")
    expected = write_stored(tmp_path / "it", FP8, hold)
    check_loaded(tmp_path / "it", expected, BLOCK)


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "type": "int", "dynamic": True}])
def test_activations_that_no_float8_product_takes_stay_in_16_bits(tmp_path, inputs):
    entry = float_quantized()
    entry["config_groups"]["group_0"]["input_activations"] = inputs
    expected = write_stored(tmp_path / "it", entry, linear_in(floats))
    check_loaded(tmp_path / "it", expected, Scheme(8, None, is_float=True))


def test_the_configuration_keeps_activations_of_blocks_in_16_bits(tmp_path):
    hold = linear_in(floats, strategy="block", name="weight_scale_inv")
    write_stored(tmp_path / "it", FP8, hold)
    config = KimiLinearConfig.from_pretrained(tmp_path / "it")
    config.quantization_config["activation_scheme"] = None
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "it", config=config)
    schemes = {p.scheme for p in model.parameters() if isinstance(p, PackedWeights)}
    assert schemes == {Scheme(**NAMED["fp8w"])}


def test_blocks_that_rows_and_inputs_of_experts_do_not_fill(tmp_path):
    def hold(stem, weight):
        is_expert = ".experts." in stem
        return floats(weight, "block", name="weight_scale_inv") if is_expert else None

    expected = write_stored(tmp_path / "it", FP8, hold, moe_intermediate_size=96)
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "it")
    read = official_state(model)
    assert all(torch.equal(read[name], x) for name, x in expected.items())
    experts = model.model.layers[1].block_sparse_moe.experts
    assert experts.gate_up_proj.scheme.rows == 32 and experts.down_proj.scheme.rows == 128


def test_wide_scales_are_rounded_to_the_models_dtype(tmp_path):
    how = {"strategy": "block", "name": "weight_scale_inv", "scale_dtype": torch.float32}
    wide = write_stored(tmp_path / "it", FP8, linear_in(floats, **how))
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "it")
    for name, x in official_state(model).items():
        torch.testing.assert_close(x, wide[name], rtol=2**-7, atol=0)
    assert model.lm_head.weight.dtype == torch.bfloat16
    exact = KimiLinearForCausalLM.from_pretrained(tmp_path / "it", dtype=torch.float32)
    for name, x in official_state(exact).items():
        assert torch.equal(x.to(torch.bfloat16), wide[name].to(torch.bfloat16)), name


def test_groups_of_modules(tmp_path):
    """By name before by pattern before by class; what is ignored stays."""
    entry = pack_quantized()
    first = entry["config_groups"]["group_0"]
    by_name, by_pattern = copy.deepcopy(first), copy.deepcopy(first)
    by_name["targets"], by_name["weights"]["num_bits"] = [Q_PROJ], 8
    by_pattern["targets"] = [r"re:.*\.self_attn\.[qk]_proj$"]
    by_pattern["weights"]["group_size"] = 64
    first["targets"].append("Embedding")
    entry["config_groups"] |= {"group_1": by_pattern, "group_2": by_name}
    entry["ignore"] = ["lm_head", r"re:.*\.mlp\..*", r"re:.*shared_experts.*"]

    def hold(stem, weight):
        if stem.endswith((".gate", "lm_head")) or ".mlp." in stem or "shared_experts" in stem:
            return None
        is_query = stem.endswith((".q_proj", ".k_proj"))
        size = 64 if is_query and stem != Q_PROJ else 128
        return integers(weight, 8 if stem == Q_PROJ else 4, size)

    expected = write_stored(tmp_path / "it", entry, hold)
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "it")
    read = official_state(model)
    assert all(torch.equal(read[name], x) for name, x in expected.items())
    schemes = {
        name: x.scheme for name, x in model.state_dict().items() if isinstance(x, PackedWeights)
    }
    assert schemes[f"{Q_PROJ}.weight"] == Scheme(8, 128)
    assert schemes["model.layers.0.self_attn.k_proj.weight"] == Scheme(4, 64)
    assert schemes["model.embed_tokens.weight"] == Scheme(4, 128)
    assert not any("mlp" in name or "shared" in name or "lm_head" in name for name in schemes)


def test_integers_and_floats_in_one_checkpoint(tmp_path):
    entry = pack_quantized()
    entry["format"] = "mixed-precision"
    first = entry["config_groups"]["group_0"]
    second = float_quantized()["config_groups"]["group_0"]
    first["targets"], second["targets"] = [r"re:.*\.experts\.\d+\.w[123]$"], ["Linear"]
    first["format"], second["format"] = "pack-quantized", "float-quantized"
    entry["config_groups"]["group_1"] = second

    def hold(stem, weight):
        if not is_linear(stem):
            return None
        return integers(weight) if ".experts." in stem else floats(weight)

    expected = write_stored(tmp_path / "it", entry, hold)
    read = official_state(KimiLinearForCausalLM.from_pretrained(tmp_path / "it"))
    assert all(torch.equal(read[name], x) for name, x in expected.items())


def test_an_order_of_inputs_that_is_none(tmp_path):
    def hold(stem, weight):
        if not is_linear(stem):
            return None
        parts, wide = integers(weight)
        order = torch.arange(weight.shape[1], dtype=torch.int32) // 128
        return parts | {"weight_g_idx": order}, wide

    expected = write_stored(tmp_path / "it", pack_quantized(actorder="group"), hold)
    check_loaded(tmp_path / "it", expected, Scheme(4, 128))

    def reverse(state):
        name = f"{EXPERTS}.3.w3.weight_g_idx"
        state[name] = state[name].flip(0)

    change_tensors(tmp_path / "it", reverse)
    with pytest.raises(ValueError, match=r"experts.3.w3.weight_g_idx reorders the inputs"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "it")


def test_parts_of_a_model_are_read_alone(tmp_path):
    """A backbone and a classifier of a language model's checkpoint, whose head is quantised."""
    from kimi_linear import KimiLinearBackbone, KimiLinearForTokenClassification

    entry = pack_quantized()
    entry["ignore"] = []

    def hold(stem, weight):
        return integers(weight) if is_linear(stem) or stem == "lm_head" else None

    expected = write_stored(tmp_path / "it", entry, hold)
    backbone = KimiLinearBackbone.from_pretrained(tmp_path / "it")
    for name, x in official_state(backbone).items():
        assert torch.equal(x, expected[f"model.{name}"]), name
    with pytest.raises(ValueError, match="lm_head"):  # a head is not left out by mistake
        change_tensors(tmp_path / "it", lambda s: [s.pop(n) for n in list(s) if "lm_head" in n])
        KimiLinearForCausalLM.from_pretrained(tmp_path / "it")
    classifier, info = KimiLinearForTokenClassification.from_pretrained(
        tmp_path / "it", num_labels=3, output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"score"}
    assert isinstance(classifier.model.layers[0].mlp.up_proj.weight, PackedWeights)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of integers; tests copy it."""
    path = tmp_path_factory.mktemp("stored") / "it"
    hold = linear_in(integers, symmetric=False)
    write_stored(path, pack_quantized(symmetric=False), hold)
    return path


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "it"
    write_stored(path, FP8, linear_in(floats, strategy="block", name="weight_scale_inv"))
    return path


def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def group_with(**weights):
    return pack_quantized(**{"symmetric": False, **weights})


def entry_with(**fields):
    return {**group_with(), **fields}


def activations_with(**fields):
    entry = group_with()
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", **fields}
    entry["config_groups"]["group_0"]["input_activations"] = args
    return entry


ENTRIES = [
    (entry_with(quant_method="awq"), "quant_method='awq' is not allowed: .* compressed-tensors"),
    (entry_with(quant_method="gptq"), "quant_method='gptq' is not allowed"),
    (entry_with(format="marlin-24"), "format='marlin-24' is not allowed.*pack-quantized"),
    (entry_with(format="int-quantized"), "format='int-quantized' is not allowed"),
    (entry_with(format="float-quantized"), "format='float-quantized' .* for integers"),
    (entry_with(format="mixed-precision"), r"config_groups.group_0.format=None"),
    (entry_with(quantization_status="frozen"), "quantization_status='frozen'"),
    (entry_with(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme=.* left out or null"),
    (entry_with(sparsity_config={"format": "dense"}), "sparsity_config=.* left out or null"),
    (entry_with(transform_config={"config_groups": {"a": 1}}), "transform_config="),
    (entry_with(config_groups={}), r"config_groups=\{\}.* at least one group"),
    (entry_with(config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16="),
    (entry_with(ignore=["re:("]), r"ignore: 're:\(' is no regular expression"),
    (entry_with(ignore="lm_head"), "ignore='lm_head'.* a list"),
    (group_with(num_bits=2), r"group_0.weights: bits=2 is not allowed: .* \(3, 4, 8\)"),
    (group_with(num_bits=5), "bits=5 is not allowed"),
    (group_with(group_size=16), "group=16 is not allowed: .* multiple of 32"),
    (group_with(group_size=None), "group_size=None is not allowed"),
    (group_with(strategy="tensor", group_size=None), "strategy='tensor'.*group, channel"),
    (group_with(strategy="tensor_group"), "strategy='tensor_group'"),
    (group_with(type="float", num_bits=4), "is_float with bits=4"),
    (group_with(type="bool"), "type='bool'"),
    (group_with(dynamic=True), "dynamic=True"),
    (group_with(scale_dtype="torch.uint8"), "scale_dtype='torch.uint8'"),
    (activations_with(dynamic=False), "group_0.input_activations=.* dynamic=true"),
]


@pytest.mark.parametrize(("entry", "message"), ENTRIES)
def test_entries_that_are_not_read_are_refused(folder, tmp_path, entry, message):
    path = copied(folder, tmp_path)
    set_entry(path, entry)
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(path)


BLOCK_ENTRIES = [
    ({**FP8, "activation_scheme": "static"}, "activation_scheme='static'"),
    ({**FP8, "weight_block_size": None}, "weight_block_size=None"),
    ({**FP8, "weight_block_size": [128]}, r"weight_block_size=\[128\]"),
    ({**FP8, "weight_block_size": [128, 100]}, "weight_block_size: group=100"),
    ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size: rows=0"),
    ({**FP8, "fmt": "e5m2"}, "fmt='e5m2'"),
]


@pytest.mark.parametrize(("entry", "message"), BLOCK_ENTRIES)
def test_blocks_that_are_not_read_are_refused(blocks, tmp_path, entry, message):
    path = copied(blocks, tmp_path)
    set_entry(path, entry)
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(path)


def without(name):
    return lambda state: state.pop(name)


def with_one(name, make):
    return lambda state: state.update({name: make(state)})


W1 = f"{EXPERTS}.2.w1"
TENSORS = [
    (without(f"{Q_PROJ}.weight_scale"), f"{Q_PROJ}.weight_scale is missing"),
    (without(f"{Q_PROJ}.weight_packed"), f"{Q_PROJ}.weight_packed is missing"),
    (without(f"{Q_PROJ}.weight_shape"), f"{Q_PROJ}.weight_shape is missing"),
    (without(f"{W1}.weight_zero_point"), f"{W1}.weight_zero_point is missing"),
    (
        lambda state: [state.pop(name) for name in list(state) if name.startswith(f"{W1}.")],
        f"{W1} is missing, and .* all experts of a layer must be held alike",
    ),
    (
        with_one(f"{Q_PROJ}.weight_shape", lambda s: torch.tensor([256, 255])),
        rf"{Q_PROJ}.weight_shape says \[256, 255\], the model needs \[256, 256\]",
    ),
    (
        with_one(f"{Q_PROJ}.weight_packed", lambda s: s[f"{Q_PROJ}.weight_packed"][:, 1:]),
        rf"{Q_PROJ}.weight_packed has shape \[256, 31\], .* it must be \[256, 32\]",
    ),
    (
        with_one(f"{Q_PROJ}.weight_scale", lambda s: s[f"{Q_PROJ}.weight_scale"][:, :1]),
        rf"{Q_PROJ}.weight_scale has shape \[256, 1\], .* it must be \[256, 2\]",
    ),
    (
        with_one(f"{Q_PROJ}.weight_packed", lambda s: s[f"{Q_PROJ}.weight_packed"].long()),
        f"{Q_PROJ}.weight_packed is in I64, it must be in I32",
    ),
    (
        with_one(f"{Q_PROJ}.weight_scale", lambda s: s[f"{Q_PROJ}.weight_scale"].double()),
        f"{Q_PROJ}.weight_scale is in F64, it must be in BF16 or F16 or F32",
    ),
    (
        with_one(f"{Q_PROJ}.input_scale", lambda s: torch.ones(1)),
        f"{Q_PROJ}.input_scale is not allowed",
    ),
    (
        with_one("model.layers.0.self_attn.k_scale", lambda s: torch.ones(1)),
        "self_attn.k_scale is not allowed",
    ),
    (
        with_one(f"{Q_PROJ}.weight", lambda s: torch.ones(256, 256)),
        f"{Q_PROJ}.weight is not allowed: 4 bits have",
    ),
    (
        with_one("lm_head.weight_scale", lambda s: torch.ones(97, 2)),
        "lm_head.weight_scale is of a quantised matrix, which no group",
    ),
    (
        with_one(f"{EXPERTS}.5.w1.weight_packed", lambda s: s[f"{W1}.weight_packed"].clone()),
        "experts.5.w1.weight has no place: num_experts=5",
    ),
    (
        with_one("model.norm.weight_scale", lambda s: torch.ones(256, 2)),
        "model.norm.weight_scale is of no matrix of the model",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[m[:60] for _, m in TENSORS])
def test_tensors_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    path = copied(folder, tmp_path)
    change_tensors(path, change)
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(path)


def test_a_matrix_that_is_wide_is_refused(folder, tmp_path):
    path = copied(folder, tmp_path)

    def widen(state):
        for name in [name for name in state if name.startswith(f"{Q_PROJ}.")]:
            del state[name]
        state[f"{Q_PROJ}.weight"] = torch.ones(256, 256)

    change_tensors(path, widen)
    message = f"{Q_PROJ}.weight is in F32, where .*group_0 says 4 bits: .* named in ignore"
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(path)


def test_experts_in_different_bits_are_refused(tmp_path):
    entry = pack_quantized()
    second = copy.deepcopy(entry["config_groups"]["group_0"])
    second["targets"], second["weights"]["num_bits"] = [W1], 8
    entry["config_groups"]["group_1"] = second

    def hold(stem, weight):
        return integers(weight, 8 if stem == W1 else 4) if is_linear(stem) else None

    write_stored(tmp_path / "it", entry, hold)
    message = f"{W1} is in 8 bits, .* in 4 bits, .* all experts of a layer must be held alike"
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "it")


def test_groups_that_do_not_divide_inputs_are_refused(tmp_path):
    entry = pack_quantized(group_size=96)
    entry["config_groups"]["group_0"]["targets"] = [Q_PROJ]

    def hold(stem, weight):
        return integers(weight, group=128) if stem == Q_PROJ else None

    write_stored(tmp_path / "it", entry, hold)
    with pytest.raises(ValueError, match=f"{Q_PROJ}.weight: group=96 .* divide the 256 inputs"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "it")


def test_a_truncated_file_is_named(folder, tmp_path):
    path = copied(folder, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated at .* tensor"):
        KimiLinearForCausalLM.from_pretrained(path.parent)


def test_scales_of_blocks_are_needed(blocks, tmp_path):
    path = copied(blocks, tmp_path)
    set_entry(path, None)
    with pytest.raises(ValueError, match="is in F8_E4M3 with a scale, which needs a quantization"):
        KimiLinearForCausalLM.from_pretrained(path)
    set_entry(path, FP8)
    change_tensors(path, without(f"{W1}.weight_scale_inv"))
    with pytest.raises(ValueError, match=f"{W1}.weight_scale_inv is missing"):
        KimiLinearForCausalLM.from_pretrained(path)


def test_other_files_than_safetensors_are_refused(folder, tmp_path):
    from safetensors.torch import load_file

    path = copied(folder, tmp_path)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors files only"):
        KimiLinearForCausalLM.from_pretrained(path)


def test_names_and_shapes_in_16_bits_are_as_ever(folder):
    """The model's own shapes do not know of packed tensors."""
    model = KimiLinearForCausalLM.from_pretrained(folder)
    assert official_shapes(model)[f"{Q_PROJ}.weight"] == (256, 256)
