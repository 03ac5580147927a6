"""`KimiLinearConfig`: the official fields, their round trip, and what is refused."""

import inspect
import json
import sys
import time

import pytest
from builders import tiny_config
from official import CONFIG as OFFICIAL

from kimi_linear import PRESETS, KimiLinearConfig, KimiLinearForCausalLM, configuration_kimi_linear
from kimi_linear.checkpoints.pretrained import AUTO_MAP

pytestmark = pytest.mark.core

# what describes the writer of a file, not the model
WRITER_KEYS = {"transformers_version", "auto_map", "architectures", "dtype"}


def saved(config, tmp_path):
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def test_official_file_round_trip(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    again = saved(KimiLinearConfig.from_pretrained(tmp_path), tmp_path / "again")
    for key in set(OFFICIAL) - {"transformers_version", "auto_map"}:
        assert json.dumps(again[key]) == json.dumps(OFFICIAL[key]), key


def test_auto_map_of_another_implementation_is_not_carried_over(tmp_path):
    again = saved(KimiLinearConfig(**OFFICIAL), tmp_path)
    assert again["auto_map"] == AUTO_MAP


def test_defaults_are_the_48b_model(tmp_path):
    written = saved(KimiLinearConfig(), tmp_path)
    for key in set(OFFICIAL) - WRITER_KEYS:
        assert json.dumps(written[key]) == json.dumps(OFFICIAL[key]), key


def test_layer_types_count_from_zero():
    kinds = KimiLinearConfig().layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [
        3,
        7,
        11,
        15,
        19,
        23,
        26,
    ]
    assert len(kinds) == 27


@pytest.mark.parametrize(
    ("full", "expected"),
    [([], "KKKK"), ([1, 2, 3, 4], "MMMM"), ([2, 4], "KMKM"), ([1], "MKKK")],
)
def test_any_pattern(full, expected):
    config = KimiLinearConfig(num_hidden_layers=4, linear_attn_config={"full_attn_layers": full})
    assert "".join("KM"[kind == "full_attention"] for kind in config.layer_types) == expected


def test_default_pattern_ends_in_mla():
    config = KimiLinearConfig(num_hidden_layers=6)
    assert config.linear_attn_config["full_attn_layers"] == [4, 6]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = KimiLinearConfig.from_preset(name)
    assert config.layer_types[-1] == "full_attention"
    other = KimiLinearConfig.from_preset(name, vocab_size=300)
    assert other.vocab_size == 300 and other.pad_token_id in (None, 299)


def test_presets_do_not_share_state():
    KimiLinearConfig.from_preset("2m").linear_attn_config["num_heads"] = 99
    assert KimiLinearConfig.from_preset("2m").linear_attn_config["num_heads"] != 99


def test_special_ids_of_the_released_vocabulary_are_for_that_vocabulary():
    config = KimiLinearConfig(vocab_size=97)
    assert config.pad_token_id is config.bos_token_id is config.eos_token_id is None
    assert KimiLinearConfig(vocab_size=163585).bos_token_id == 163584


def test_moe_layers():
    config = tiny_config(first_k_dense_replace=1, moe_layer_freq=2)
    assert [config.is_moe_layer(i) for i in range(4)] == [False, False, True, False]


def test_aliases_of_transformers():
    config = KimiLinearConfig(
        num_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3, max_position_embeddings=77
    )
    assert (config.num_expert_group, config.num_experts_per_token, config.model_max_length) == (
        3,
        3,
        77,
    )
    assert config.num_local_experts == config.n_routed_experts == config.num_experts


def test_spelling_of_the_native_class():
    config = KimiLinearConfig(
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "dense", "sparse"],
        linear_head_dim=64,
        linear_num_heads=5,
        linear_conv_kernel_dim=3,
    )
    assert config.linear_attn_config == {
        "full_attn_layers": [2],
        "head_dim": 64,
        "kda_layers": [1, 3],
        "num_heads": 5,
        "short_conv_kernel_size": 3,
    }
    assert config.first_k_dense_replace == 2


REFUSED = {
    "num_key_value_heads": dict(num_key_value_heads=8),
    "mla_use_nope": dict(mla_use_nope=False),
    "num_expert_group": dict(num_experts=10, num_expert_group=3),
    "topk_group": dict(num_expert_group=2, topk_group=3),
    "num_experts_per_token": dict(num_experts=8, num_experts_per_token=9),
    "use_grouped_topk": dict(num_expert_group=2, use_grouped_topk=False),
    "hidden_act": dict(hidden_act="situ"),
    "moe_router_activation_func": dict(moe_router_activation_func="tanh"),
    "activation_situ_beta": dict(activation_situ_beta=4.0),
    "attention_bias": dict(attention_bias=True),
    "output_router_logits": dict(output_router_logits="yes"),
    "attn_res_block_size": dict(attn_res_block_size=12),
    "mla_use_output_gate": dict(mla_use_output_gate=True),
    "routed_expert_hidden_size": dict(routed_expert_hidden_size=3584),
    "topk_method": dict(topk_method="greedy"),
    "gate_lower_bound": dict(linear_attn_config={"gate_lower_bound": -5.0}),
    "use_full_rank_gate": dict(linear_attn_config={"use_full_rank_gate": True}),
    "max_prompt_tokens": dict(max_prompt_tokens=0),
    "rope_scaling": dict(rope_scaling={"type": "yarn"}),
    "num_nextn_predict_layers": dict(num_nextn_predict_layers=1),
    "full_attn_layers": dict(
        num_hidden_layers=2, linear_attn_config={"kda_layers": [1, 2], "full_attn_layers": [2]}
    ),
    r"missing: \[3\]": dict(
        num_hidden_layers=3, linear_attn_config={"kda_layers": [1], "full_attn_layers": [2]}
    ),
    "layer numbers from 1": dict(
        num_hidden_layers=2, linear_attn_config={"full_attn_layers": [0, 2]}
    ),
    "layer_types": dict(layer_types=["full_attention"]),
    "mlp_layer_types": dict(num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"]),
    "contradicts": dict(num_experts_per_tok=4, num_experts_per_token=5),
    "linear_head_dim|head_dim": dict(linear_head_dim=64, linear_attn_config={"head_dim": 32}),
    "did you mean 'hidden_size'": dict(hiden_size=64),
    "hidden_size": dict(hidden_size="64"),
    "moe_intermediate_size": dict(moe_intermediate_size=22),
    "pad_token_id": dict(vocab_size=97, pad_token_id=97),
    "eos_token_id": dict(eos_token_id=[5, "x"]),
    r"a list of layer numbers": dict(linear_attn_config={"full_attn_layers": 4}),
    "vocab_size": dict(vocab_size=0),
    "num_hidden_layers": dict(num_hidden_layers=True),
    "rms_norm_eps": dict(rms_norm_eps=0),
    "attention_dropout": dict(attention_dropout=1.0),
    r"linear_attn_config\['head_dim'\]": dict(linear_attn_config={"head_dim": 512}),
    r"linear_attn_config\['short_conv_kernel_size'\]": dict(
        linear_attn_config={"short_conv_kernel_size": 9}
    ),
    "tie_word_embeddings": dict(tie_word_embeddings="yes"),
}


@pytest.mark.parametrize("named", REFUSED)
def test_wrong_values_are_refused_by_name(named):
    with pytest.raises(ValueError, match=named):
        KimiLinearConfig(**REFUSED[named])


LONG = "y" * 10**5
MALFORMED = {
    "num_hidden_layers=100000": dict(num_hidden_layers=10**8),
    "num_experts=100000": dict(num_experts=10**9),
    "vocab_size=100000": dict(vocab_size=10**12),
    "num_labels=100000": dict(num_labels=10**9),
    r"linear_attn_config\['num_heads'\]=100": dict(linear_attn_config={"num_heads": 10**12}),
    "rms_norm_eps=inf": dict(rms_norm_eps=float("inf")),
    "rms_norm_eps=nan": dict(rms_norm_eps=float("nan")),
    "rms_norm_eps=1000000": dict(rms_norm_eps=10**400),
    "routed_scaling_factor=inf": dict(routed_scaling_factor=float("inf")),
    r"routed_scaling_factor=1e\+300": dict(routed_scaling_factor=1e300),
    "initializer_range=inf": dict(initializer_range=float("inf")),
    "router_z_loss_coef=inf": dict(router_z_loss_coef=float("inf")),
    "rope_theta='x'": dict(rope_theta="x"),
    r"auto_map=\[1\]": dict(auto_map=[1]),
    "auto_map='x'": dict(auto_map="x"),
    r"auto_map=\{'AutoConfig': 3\}": dict(auto_map={"AutoConfig": 3}),
    r"auto_map=\{'AutoTokenizer': \[\[\]\]\}": dict(auto_map={"AutoTokenizer": [[]]}),
    "layer_types=3": dict(layer_types=3),
    r"layer_types=\[\[1\], \[1\]\]": dict(num_hidden_layers=2, layer_types=[[1], [1]]),
    "mlp_layer_types=3": dict(mlp_layer_types=3),
    r"linear_attn_config\['full_attn_layers'\]=\[\[1\]\]": dict(
        linear_attn_config={"full_attn_layers": [[1]]}
    ),
    r"linear_attn_config\['kda_layers'\]=\[None\]": dict(linear_attn_config={"kda_layers": [None]}),
    "dtype='evil'": dict(dtype="evil"),
    "dtype='save'": dict(torch_dtype="save"),
    "hidden_size='yyy": dict(hidden_size=LONG),
    "mla_use_nope='yyy": dict(mla_use_nope=LONG),
    "attention_bias='yyy": dict(attention_bias=LONG),
    "hiden_size='yyy": dict(hiden_size=LONG),
    "n_group='yyy": dict(n_group=LONG, num_expert_group=2),
    r"rope_scaling=\{'a'": dict(rope_scaling={"a": [LONG] * 9, "b": dict.fromkeys("abcdef", LONG)}),
    r"layer_types=\['yyy": dict(layer_types=[LONG] * 9),
    "missing: ": dict(
        num_hidden_layers=9999, linear_attn_config={"full_attn_layers": [1], "kda_layers": [2]}
    ),
}


@pytest.mark.parametrize("named", MALFORMED)
def test_a_malformed_file_is_refused_at_once_in_a_line(named, tmp_path):
    """Bug: hours, all memory, megabytes of message, NaN logits or AttributeError."""
    fields = {"model_type": "kimi_linear", **MALFORMED[named]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    began = time.monotonic()
    with pytest.raises(ValueError, match=named) as error:
        KimiLinearConfig.from_pretrained(tmp_path)
    assert time.monotonic() - began < 5
    message = str(error.value)
    assert len(message) < 800 and "\n" not in message


def test_a_size_broken_after_construction_is_refused_at_once(tmp_path):
    config = tiny_config()
    config.num_hidden_layers = 10**9
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000"):
        config.save_pretrained(tmp_path)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="48b-a3b"):
        KimiLinearConfig.from_preset("7b")


def test_a_field_broken_after_construction_is_refused_on_save(tmp_path):
    config = tiny_config()
    config.num_experts_per_token = 1000
    with pytest.raises(ValueError, match="num_experts_per_token=1000"):
        config.save_pretrained(tmp_path)


def test_other_metadata_is_kept(tmp_path):
    assert saved(tiny_config(my_note="kept"), tmp_path)["my_note"] == "kept"


def test_fewer_layers_of_a_loaded_configuration():
    """The smoke test of a large model: its first layers."""
    config = tiny_config("alternating")
    before = config.linear_attn_config
    config.num_hidden_layers = 2
    model = KimiLinearForCausalLM(config)
    assert len(model.model.layers) == 2
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.linear_attn_config["kda_layers"] == [1]
    assert before["kda_layers"] == [1, 3]  # another configuration may share it
    assert KimiLinearConfig.from_dict(config.to_dict()).num_hidden_layers == 2
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="full_attn_layers|kda_layers"):
        KimiLinearForCausalLM(config)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.0"])
def test_an_older_transformers_is_named(monkeypatch, version):
    source = inspect.getsource(configuration_kimi_linear)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=f"needs Transformers 5.17 or newer, this is {version}"):
        exec(compile(source, "configuration_kimi_linear.py", "exec"), {"__name__": "old"})
