"""What stands in files for weights in few bits: compressed-tensors' own reader gives the weights
back, bit by bit."""

import json

import pytest
import torch
from builders import tiny_config, tiny_model

from kimi_linear.checkpoints.bits import from_words, num_words, to_words
from kimi_linear.checkpoints.packed import (
    compressed_config,
    config_of,
    module_names,
    packed_entries,
)
from kimi_linear.checkpoints.packed_config import stored_schemes
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.schemes import Scheme

try:
    import compressed_tensors
except ImportError:
    compressed_tensors = None

SCHEMES = {
    "3 bits": Scheme(3, 64),
    "3 bits, zeros": Scheme(3, 32, is_symmetric=False),
    "4 bits": Scheme(4, 32),
    "4 bits, zeros": Scheme(4, 64, is_symmetric=False),
    "4 bits a row, zeros": Scheme(4, None, is_symmetric=False),
    "8 bits a row": Scheme(8, None),
    "8 bits, zeros": Scheme(8, 96, is_symmetric=False),
    "8 bits, rows": Scheme(8, 64, rows=8),
    "float8 a row": Scheme(8, None, is_float=True),
    "float8 groups": Scheme(8, 96, is_float=True),
    "float8 blocks": Scheme(8, 128, is_float=True, rows=32),
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
BLOCKS = "fp8"
EXPERTS = "model.layers.3.block_sparse_moe.experts"


def packed(scheme, *shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(shape, generator=generator).to(dtype), scheme)


def by_compressed_tensors(tensors, stem, scheme):
    """A matrix as the package itself reads it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    entry = config_of({stem: scheme, "other": Scheme(4)})  # the other: never as `fp8`
    found = QuantizationConfig.model_validate(entry)
    group = next(g for g in found.config_groups.values() if stem in g.targets)
    compressor = BaseCompressor.get_value_from_registry(group.format or found.format)
    own = {n.removeprefix(f"{stem}."): t for n, t in tensors.items() if n.startswith(f"{stem}.")}
    return compressor.decompress(own, group)["weight"]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("num_codes", [1, 7, 8, 33, 96, 100])
def test_codes_come_back_from_words(bits, num_codes):
    codes = torch.randint(0, 1 << bits, (5, num_codes), dtype=torch.uint8)
    words = to_words(codes, bits)
    assert words.shape == (5, num_words(num_codes, bits)) and words.dtype == torch.int32
    assert torch.equal(from_words(words, bits, num_codes), codes)


@pytest.mark.skipif(compressed_tensors is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("num_codes", [1, 7, 8, 33, 96, 100])
def test_words_are_those_of_compressed_tensors(bits, num_codes):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (5, num_codes), dtype=torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(to_words(codes, bits), pack_to_int32(signed, bits))


@by_scheme
def test_a_matrix_has_the_tensors_of_its_format(scheme):
    weights = packed(scheme, 40, 192)
    stem = "model.layers.0.self_attn.q_proj"
    found = dict(packed_entries(f"{stem}.weight", weights))
    groups = scheme.num_groups(192)
    if scheme.is_float:
        rows = -(-40 // scheme.rows)
        expected = {"weight": (40, 192), "weight_scale": (rows, groups)}
        assert found[f"{stem}.weight"].dtype == torch.float8_e4m3fn
    else:
        words = -(-192 * scheme.bits // 32)
        expected = {"weight_packed": (40, words), "weight_scale": (40, groups)}
        expected["weight_shape"] = (2,)
        assert found[f"{stem}.weight_shape"].tolist() == [40, 192]
        if not scheme.is_symmetric:
            expected["weight_zero_point"] = (-(-40 * scheme.bits // 32), groups)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        f"{stem}.{name}": shape for name, shape in expected.items()
    }
    assert found[f"{stem}.weight_scale"].dtype == torch.bfloat16
    assert all(x.is_contiguous() for x in found.values())


@pytest.mark.skipif(compressed_tensors is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@by_scheme
def test_compressed_tensors_reads_the_same_weights(scheme, dtype):
    weights = packed(scheme, 40, 192, dtype=dtype)
    tensors = dict(packed_entries("lm_head.weight", weights))
    read = by_compressed_tensors(tensors, "lm_head", scheme)
    assert torch.equal(read, weights.dequantized())


def test_scales_are_in_the_weights_dtype():
    """As a model has them that was made wider; what is narrower might lose them."""
    weights = packed(Scheme(4, 32), 40, 192)
    for dtype, expected in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ):
        found = dict(packed_entries("lm_head.weight", weights.like(weights.device, dtype)))
        assert found["lm_head.weight_scale"].dtype == expected
        assert torch.equal(found["lm_head.weight_scale"].float(), weights.scales().float())


@pytest.mark.skipif(compressed_tensors is None, reason="compressed-tensors is not installed")
@by_scheme
def test_compressed_tensors_reads_each_expert(scheme):
    kinds = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    for fused, names in kinds.items():
        weights = packed(scheme, 3, 32 * len(names), 192)
        tensors = dict(packed_entries(f"{EXPERTS}.{fused}", weights))
        expected = weights.dequantized()
        for expert in range(3):
            for i, kind in enumerate(names):
                stem = f"{EXPERTS}.{expert}.{kind}"
                entry = {name.replace(stem, "x"): x for name, x in tensors.items()}
                read = by_compressed_tensors(entry, "x", scheme)
                assert torch.equal(read, expected[expert, i * 32 : (i + 1) * 32])


def test_experts_have_the_official_names():
    tensors = dict(packed_entries(f"{EXPERTS}.gate_up_proj", packed(Scheme(4, 32), 3, 24, 64)))
    kinds = ("weight_packed", "weight_scale", "weight_shape")
    expected = [f"{EXPERTS}.{e}.{w}.{k}" for e in range(3) for w in ("w1", "w3") for k in kinds]
    assert list(tensors) == expected


def test_deepseeks_name_of_a_scale():
    weights = packed(Scheme(8, 128, is_float=True, rows=128), 200, 192)
    found = dict(packed_entries("lm_head.weight", weights, is_fp8=True))
    assert {n: tuple(x.shape) for n, x in found.items()} == {
        "lm_head.weight": (200, 192),
        "lm_head.weight_scale_inv": (2, 2),
    }


def test_blocks_that_belong_to_two_matrices_are_refused():
    weights = packed(Scheme(8, 128, is_float=True, rows=128), 3, 48, 64)
    with pytest.raises(ValueError, match="gate_up_proj: rows=128 is not allowed: .* the 24 rows"):
        dict(packed_entries(f"{EXPERTS}.gate_up_proj", weights))


# ---- quantization_config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"q_lora_rank": 12}, {"num_shared_experts": 0}, {"tie_word_embeddings": True}]
)
def test_modules_are_those_of_the_model(fields):
    model = tiny_model(**fields)
    named = {name for name, module in model.named_modules() if name.endswith(".experts")}
    named |= {
        name.removesuffix(".weight")
        for name, x in model.named_parameters()
        if x.dim() == 2 and name.endswith(".weight")
    }
    found = list(module_names(model.config))
    assert set(found) == named and len(found) == len(named)


def test_parts_in_different_bits_are_groups():
    quantization = KimiLinearQuantizationConfig.from_preset("24gb")
    entry = compressed_config(quantization, tiny_config())
    assert json.loads(json.dumps(entry)) == entry
    assert entry["quant_method"] == "compressed-tensors" and entry["format"] == "pack-quantized"
    assert entry["quantization_status"] == "compressed"
    first, second = entry["config_groups"].values()
    experts = r"re:.*\.experts\..*\.(w1|w3|w2|gate_proj|up_proj|down_proj)$"
    assert first["targets"] == [experts]
    assert first["weights"] == {
        "num_bits": 3,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
        "dynamic": False,
    }
    assert second["targets"] == [
        "model.embed_tokens",
        r"re:.*\.self_attn\.(q_proj|k_proj|v_proj|f_a_proj|g_a_proj|o_proj|kv_a_proj_with_mqa)$",
        r"re:.*\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$",
        r"re:.*\.shared_experts\.(gate_proj|up_proj|down_proj|gate_up_proj)$",
        "lm_head",
    ]
    assert entry["ignore"] == [
        r"re:.*\.self_attn\.(f_b_proj|b_proj|g_b_proj|kv_b_proj)$",
        r"re:.*\.block_sparse_moe\.gate$",
    ]


def test_blocks_of_all_parts_are_fp8():
    quantization = KimiLinearQuantizationConfig(BLOCKS, BLOCKS, BLOCKS)
    entry = compressed_config(quantization, tiny_config())
    plain = entry.pop("modules_to_not_convert")
    assert entry == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert "lm_head" in plain and "model.layers.3.self_attn.kv_b_proj" in plain
    assert not any("o_proj" in name or "experts" in name for name in plain)


def test_blocks_of_some_parts_are_float_quantized():
    quantization = KimiLinearQuantizationConfig(experts=BLOCKS, head=BLOCKS)
    entry = compressed_config(quantization, tiny_config())
    assert entry["format"] == "float-quantized"
    (group,) = entry["config_groups"].values()
    assert group["weights"]["strategy"] == "block" and group["targets"][-1] == "lm_head"
    assert group["weights"]["block_structure"] == [128, 128]


@pytest.mark.parametrize(
    ("scheme", "inputs"),
    [
        ("fp8w", None),
        ("fp8", ("group", 128)),
        ({"bits": 8, "group": None, "is_float": True, "activation_scheme": "dynamic"}, ("token",)),
    ],
)
def test_whether_activations_are_quantised_is_written(scheme, inputs):
    """Blocks whose activations stay in 16 bits are not "fp8", which has no word for that."""
    quantization = KimiLinearQuantizationConfig(scheme, scheme, scheme, head=None)
    if scheme == "fp8":
        quantization.schemes["shared_experts"] = None
    entry = compressed_config(quantization, tiny_config())
    (group,) = entry["config_groups"].values()
    found = group["input_activations"]
    if inputs is None:
        assert found is None
    else:
        strategy, size = (*inputs, None)[:2]
        assert (found["strategy"], found["group_size"]) == (strategy, size)
        assert found["dynamic"] is True and found["type"] == "float" and found["num_bits"] == 8
    read = stored_schemes(entry).groups[0].scheme
    assert read == quantization.schemes["experts"]


def test_two_formats_are_named_by_each_group():
    quantization = KimiLinearQuantizationConfig(experts=BLOCKS, head={"bits": 4})
    entry = compressed_config(quantization, tiny_config())
    assert entry["format"] == "mixed-precision"
    formats = [group["format"] for group in entry["config_groups"].values()]
    assert formats == ["float-quantized", "pack-quantized"]


def test_single_layers_are_named():
    schemes = dict.fromkeys(module_names(tiny_config()))
    schemes["model.layers.1.self_attn.q_proj"] = Scheme(4)
    schemes["model.layers.2.block_sparse_moe.experts"] = Scheme(4)
    (group,) = config_of(schemes)["config_groups"].values()
    assert (
        group["targets"]
        == [
            r"re:model\.layers\.2\.block_sparse_moe\.experts\..*\.(w1|w3|w2|gate_proj|up_proj|down_proj)$",
            r"re:model\.layers\.1\.self_attn\.q_proj$",
        ][::-1]
    )


def test_nothing_in_few_bits_is_refused():
    with pytest.raises(ValueError, match="no weights are in few bits"):
        compressed_config(KimiLinearQuantizationConfig(), tiny_config())


@pytest.mark.skipif(compressed_tensors is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("preset", ["24gb", "48gb"])
def test_compressed_tensors_takes_the_entry(preset):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    quantization = KimiLinearQuantizationConfig.from_preset(preset)
    config = tiny_config()
    found = QuantizationConfig.model_validate(compressed_config(quantization, config))
    for name in module_names(config):
        scheme = quantization.scheme_of(name)
        stems = [f"{name}.{e}.{w}" for e in range(2) for w in ("w1", "w2", "w3")]
        for stem in stems if name.endswith(".experts") else [name]:
            groups = [
                group.weights.num_bits
                for group in found.config_groups.values()
                if any(match_name(stem, target) for target in group.targets)
            ]
            assert groups == ([scheme.bits] if scheme else [])
            assert any(match_name(stem, each) for each in found.ignore) == (scheme is None)
