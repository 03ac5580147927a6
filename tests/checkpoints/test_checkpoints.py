"""Checkpoints: the released layout in and out, by name, shape, dtype and value.

`layout` below writes the released layout down a second time, independent of the package's code; it
is itself compared with the list of the released tensors.
"""

import json
import os
import shutil
from pathlib import Path

import commands
import official
import pytest
import torch
import transformers.models.kimi_linear as native
from builders import tiny_config, tiny_model, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.conversion_mapping import (
    _build_checkpoint_conversion_mapping,
    get_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import revert_weight_conversion

from kimi_linear import (
    KimiLinearBackbone,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearForTokenClassification,
)
from kimi_linear.checkpoints.files import stored_tensors
from kimi_linear.checkpoints.names import official_shapes

pytestmark = pytest.mark.core

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MOE_PATTERNS = {
    "dense_first": {},
    "every_other": {"moe_layer_freq": 2, "first_k_dense_replace": 2, "num_hidden_layers": 5},
}


# ---- the layout


def layout(config: KimiLinearConfig, dtype: str = "BF16", base: str = "model.") -> dict:
    """Shape and dtype by name of the backbone's tensors, as the released files have them."""
    D, V = config.hidden_size, config.vocab_size
    shapes = {"embed_tokens.weight": (V, D), "norm.weight": (D,)}
    for number in range(1, config.num_hidden_layers + 1):
        is_mla = number in config.linear_attn_config["full_attn_layers"]
        index = number - 1
        has_experts = index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0
        shapes |= {f"layers.{index}.{norm}_layernorm.weight": (D,) for norm in NORMS}
        attention = mla_layout(config) if is_mla else kda_layout(config)
        shapes |= {f"layers.{index}.self_attn.{name}": s for name, s in attention.items()}
        feed_forward = (
            {f"block_sparse_moe.{name}": s for name, s in moe_layout(config).items()}
            if has_experts
            else {f"mlp.{n}": s for n, s in mlp_layout(D, config.intermediate_size).items()}
        )
        shapes |= {f"layers.{index}.{name}": s for name, s in feed_forward.items()}
    return {
        base + name: (s, "F32" if name.endswith(("A_log", "dt_bias")) else dtype)
        for name, s in shapes.items()
    }


STD = tiny_config().initializer_range
NORMS = ("input", "post_attention")


def mlp_layout(hidden: int, width: int) -> dict:
    return {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }


def kda_layout(config: KimiLinearConfig) -> dict:
    linear, D = config.linear_attn_config, config.hidden_size
    heads, size, width = (
        linear[key] for key in ("num_heads", "head_dim", "short_conv_kernel_size")
    )
    return {
        **{f"{x}_proj.weight": (heads * size, D) for x in "qkv"},
        **{f"{x}_conv1d.weight": (heads * size, 1, width) for x in "qkv"},
        **{f"{x}_a_proj.weight": (size, D) for x in "fg"},
        **{f"{x}_b_proj.weight": (heads * size, size) for x in "fg"},
        "b_proj.weight": (heads, D),
        "A_log": (1, 1, heads, 1),
        "dt_bias": (heads * size,),
        "o_norm.weight": (size,),
        "o_proj.weight": (D, heads * size),
    }


def mla_layout(config: KimiLinearConfig) -> dict:
    D, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    own, shared, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return {
        "q_proj.weight": (heads * (own + shared), D),
        "kv_a_proj_with_mqa.weight": (rank + shared, D),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (own + value), rank),
        "o_proj.weight": (D, heads * value),
    }


def moe_layout(config: KimiLinearConfig) -> dict:
    D, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    shared = mlp_layout(D, width * config.num_shared_experts)
    shapes = {
        "gate.weight": (experts, D),
        "gate.e_score_correction_bias": (experts,),
        **{f"shared_experts.{name}": shape for name, shape in shared.items()},
    }
    for expert in range(experts):
        shapes[f"experts.{expert}.w1.weight"] = (width, D)
        shapes[f"experts.{expert}.w2.weight"] = (D, width)
        shapes[f"experts.{expert}.w3.weight"] = (width, D)
    return shapes


def causal_layout(config: KimiLinearConfig, dtype: str = "F32") -> dict:
    head = {"lm_head.weight": ((config.vocab_size, config.hidden_size), dtype)}
    return layout(config, dtype) | ({} if config.tie_word_embeddings else head)


def shards(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def saved(folder: Path) -> dict:
    """Shape and dtype by name, of all safetensors files of a folder, read by safetensors."""
    found = {}
    for path in shards(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found, f"{name} is saved twice"
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in shards(folder) for name, t in load_file(path).items()}


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 21), use_cache=False).logits


def assert_clean(info: dict) -> None:
    assert {key: list(value) for key, value in info.items() if value} == {}


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """A float32 checkpoint in several shards. Tests that change it copy it first."""
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(shards(path)) > 3
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- the released checkpoint


def test_this_files_layout_is_the_released_one():
    config = KimiLinearConfig()
    head = {"lm_head.weight": ((config.vocab_size, config.hidden_size), "BF16")}
    assert layout(config) | head == official.tensors()


def test_full_size_model_maps_onto_every_released_tensor():
    with torch.device("meta"):
        model = KimiLinearForCausalLM(KimiLinearConfig()).to(torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())
    found = {name: (tuple(tensor.shape), CODES[tensor.dtype]) for name, tensor in state.items()}
    assert found == official.tensors()
    assert len(found) == 20_493
    assert sum(tensor.numel() for tensor in state.values()) == 49_122_681_728
    assert official_shapes(model) == {name: shape for name, (shape, _) in found.items()}


# ---- saving


@pytest.mark.parametrize("moe", MOE_PATTERNS)
@pytest.mark.parametrize("shard", ["50GB", "40KB"])
@pytest.mark.parametrize("dtype", CODES, ids=CODES.values())
def test_save_writes_the_released_layout(tmp_path, moe, shard, dtype):
    model = tiny_model(**MOE_PATTERNS[moe]).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    expected = causal_layout(model.config, CODES[dtype])
    assert saved(tmp_path) == expected
    if shard == "50GB":
        assert [path.name for path in shards(tmp_path)] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(shards(tmp_path)) > 3
        assert index["weight_map"].keys() == expected.keys()
        assert set(index["weight_map"].values()) == {path.name for path in shards(tmp_path)}


def test_save_after_from_config(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert type(model) is KimiLinearForCausalLM
    model.save_pretrained(tmp_path)
    assert saved(tmp_path) == causal_layout(model.config, "BF16")


def test_save_after_from_pretrained_repeats_every_byte(folder, tmp_path):
    KimiLinearForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    before, after = values(folder), values(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_save_after_loading_a_state_dict(model, tmp_path):
    other = KimiLinearForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert_same_state(other, model)
    other.save_pretrained(tmp_path)
    assert saved(tmp_path) == causal_layout(model.config)


def test_save_of_a_given_state_dict(model, tmp_path):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert saved(tmp_path) == causal_layout(model.config)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight + 1)


def test_trainer_checkpoint(tmp_path):
    model = tiny_model("mla_first", num_hidden_layers=2).to(torch.bfloat16)
    data = [{"input_ids": row, "labels": row} for row in token_ids(4, 9)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=1,
            save_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data,
    )
    trainer.train()
    assert saved(tmp_path / "checkpoint-1") == causal_layout(model.config, "BF16")
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype="auto")
    assert_same_state(again, model)


def test_saving_over_the_loaded_files(copied, model):
    """The loaded tensors must not be views of files that saving overwrites."""
    loaded = KimiLinearForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        loaded.model.norm.weight.fill_(3.0)
    loaded.save_pretrained(copied, max_shard_size="60KB")
    again = KimiLinearForCausalLM.from_pretrained(copied)
    assert torch.equal(again.model.norm.weight, torch.full_like(again.model.norm.weight, 3.0))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to_and_back": lambda model: model.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_decay_parameters_alone(cast):
    model = tiny_model()
    decay = {n: p for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias"))}
    before = {name: parameter.detach().clone() for name, parameter in decay.items()}
    assert len(before) == 6
    # the test means something: rounding would change them
    assert all(not torch.equal(value, value.bfloat16().float()) for value in before.values())
    model = CASTS[cast](model)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name
    others = {p.dtype for n, p in model.named_parameters() if n not in before}
    assert others == {model.lm_head.weight.dtype}
    model(token_ids(1, 8), labels=token_ids(1, 8)).loss.backward()
    assert {model.get_parameter(name).grad.dtype for name in before} == {torch.float32}
    model = CASTS[cast](model)
    assert {model.get_parameter(name).grad.dtype for name in before} == {torch.float32}


def test_experts_beyond_the_tenth_keep_their_places(tmp_path):
    """As text, "10" comes before "2"."""
    model = tiny_model("mla_first", num_experts=13, num_hidden_layers=2)
    experts = model.model.layers[1].block_sparse_moe.experts
    for expert in range(13):
        experts.gate_up_proj.data[expert, :24] = expert + 0.1
        experts.gate_up_proj.data[expert, 24:] = expert + 0.3
        experts.down_proj.data[expert] = expert + 0.2
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = values(tmp_path)
    for expert in range(13):
        for weight in (1, 2, 3):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.w{weight}.weight"
            assert stored[name].unique().tolist() == pytest.approx([expert + weight / 10])
            stored[name] = stored[name] + 100  # so that loading is seen to come from the file
    for path in shards(tmp_path):
        path.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path).model.layers[1]
    for name in ("gate_up_proj", "down_proj"):
        expected = experts.get_parameter(name) + 100
        assert torch.equal(loaded.block_sparse_moe.experts.get_parameter(name), expected)


# ---- loading

WAYS = {
    "plain": {},
    "auto": {"dtype": "auto"},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "device_map_cpu": {"device_map": "cpu"},
    "device_map_auto": {"device_map": "auto"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moe", MOE_PATTERNS)
def test_load_is_exact(tmp_path, way, moe):
    model = tiny_model(**MOE_PATTERNS[moe])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded, info = KimiLinearForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, **WAYS[way]
    )
    assert_clean(info)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_load_in_another_dtype(tmp_path, stored, wanted):
    model = tiny_model().to(stored)
    model.save_pretrained(tmp_path)
    loaded, info = KimiLinearForCausalLM.from_pretrained(
        tmp_path, dtype=wanted, output_loading_info=True
    )
    assert_clean(info)
    assert_same_state(loaded, model.to(wanted))


def test_dtype_auto_of_16_bits(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_state(KimiLinearForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)


@pytest.mark.parametrize("offloaded", ["cpu", "disk"])
def test_offload(folder, model, tmp_path, offloaded):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": offloaded if i % 2 else "cpu" for i in range(4)}
    loaded = KimiLinearForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    is_meta = loaded.model.layers[1].input_layernorm.weight.is_meta
    assert is_meta == (offloaded == "disk")
    assert_close(logits(loaded), logits(model), torch.float32)
    loaded.save_pretrained(tmp_path / "saved")
    assert saved(tmp_path / "saved") == causal_layout(model.config)
    assert_same_state(KimiLinearForCausalLM.from_pretrained(tmp_path / "saved"), model)


def test_fused_experts_load_too(model, tmp_path):
    """Transformers' `save_original_format=False` keeps the model's own names."""
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.block_sparse_moe.experts.gate_up_proj" in saved(tmp_path)
    loaded, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert_same_state(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again") == causal_layout(model.config)


def test_backbone_from_a_language_model_and_back(folder, model, tmp_path):
    backbone, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(backbone).__name__ == KimiLinearBackbone.__name__
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert_same_state(backbone, model.model)
    backbone.save_pretrained(tmp_path)
    assert saved(tmp_path) == layout(model.config, "F32", base="")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]
    assert_same_state(again.model, backbone)
    assert again.lm_head.weight.std().item() == pytest.approx(STD, rel=0.1)


HEADS = {
    KimiLinearForSequenceClassification: {"score.weight": (3, 40)},
    KimiLinearForTokenClassification: {"score.weight": (3, 40), "score.bias": (3,)},
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_new_heads(folder, model, tmp_path, head):
    classifier, info = head.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == set(HEADS[head])
    assert_same_state(classifier.model, model.model)
    assert classifier.score.weight.std().item() == pytest.approx(STD, rel=0.3)
    classifier.save_pretrained(tmp_path)
    scores = {name: (shape, "F32") for name, shape in HEADS[head].items()}
    assert saved(tmp_path) == layout(model.config, "F32") | scores
    again, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert_same_state(again, classifier)


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert saved(tmp_path) == causal_layout(model.config)
    assert "lm_head.weight" not in saved(tmp_path)
    loaded, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


# ---- initialisation


@pytest.fixture
def poisoned_memory():
    """New memory holds NaN, so that a parameter nobody initialises is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "cls", [KimiLinearForCausalLM, KimiLinearForTokenClassification], ids=lambda c: c.__name__
)
def test_from_config_initialises_everything(poisoned_memory, cls):
    model = cls._from_config(tiny_config(q_lora_rank=10))
    bound = model.config.linear_attn_config["short_conv_kernel_size"] ** -0.5
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("e_score_correction_bias") or name == "score.bias":
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        elif name.endswith("A_log"):
            assert tensor.min() >= 0 and tensor.max() <= torch.tensor(16.0).log()
            assert tensor.unique().numel() == 2
        elif name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(tensor)
            assert 1e-3 * 0.999 <= step.min() < 3e-3 and 3e-2 < step.max() <= 1e-1 * 1.001
        elif "conv1d" in name:
            assert bound * 0.8 < tensor.abs().max() <= bound
        elif name.endswith("embed_tokens.weight"):
            assert tensor[:-1].std().item() == pytest.approx(STD, rel=0.1), name
        else:
            assert tensor.std().item() == pytest.approx(STD, rel=0.3), name


def test_initialisation_leaves_loaded_weights_alone(copied, poisoned_memory, tmp_path):
    """Every kind of parameter, at values no initialisation gives, beside a new head."""
    stored = {}
    for number, path in enumerate(shards(copied)):
        tensors = {
            name: torch.full_like(tensor, 7.0 + number) for name, tensor in load_file(path).items()
        }
        stored |= tensors
        save_file(tensors, path, metadata={"format": "pt"})
    model = KimiLinearForSequenceClassification.from_pretrained(copied, num_labels=3)
    model.init_weights()
    model.save_pretrained(tmp_path / "again")
    state = values(tmp_path / "again")
    assert stored.keys() - state.keys() == {"lm_head.weight"}
    for name in stored.keys() & state.keys():
        assert torch.equal(state[name], stored[name]), name
    assert model.score.weight.isfinite().all() and model.score.weight.abs().max() < 2


# ---- broken files


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def edit(folder: Path, name: str, change) -> str:
    """Replace tensor `name` by `change(tensor)`, or drop it for None; the shard's file name."""
    path = folder / index_of(folder)[name]
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    return path.name


EXPERT = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
PLAIN = "model.layers.1.self_attn.b_proj.weight"


@pytest.mark.parametrize("name", [EXPERT, PLAIN, "lm_head.weight"])
def test_missing_tensor(copied, name):
    edit(copied, name, lambda tensor: None)
    with pytest.raises(ValueError, match=f"shards in .*1 tensors .* missing: {name}"):
        KimiLinearForCausalLM.from_pretrained(copied)


def test_missing_tensors_are_reported_where_a_report_is_asked_for(copied, model):
    name = "model.layers.1.self_attn.b_proj.weight"
    edit(copied, name, lambda tensor: None)
    loaded, info = KimiLinearForCausalLM.from_pretrained(copied, output_loading_info=True)
    assert set(info["missing_keys"]) == {name} and not info["unexpected_keys"]
    others = {key: x for key, x in model.state_dict().items() if key != name}
    assert all(torch.equal(loaded.state_dict()[key], x) for key, x in others.items())
    with pytest.raises(ValueError, match=name):  # the wish ends with its call
        KimiLinearForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("name", [EXPERT, PLAIN])
def test_wrong_shape(copied, name):
    shard = edit(copied, name, lambda tensor: tensor[:-1].clone())
    with pytest.raises(ValueError, match=rf"{shard}: tensor {name} has shape \[.* needs \["):
        KimiLinearForCausalLM.from_pretrained(copied)


def test_transposed_experts_of_equal_size(copied):
    shard = edit(copied, EXPERT, lambda tensor: tensor.T.contiguous())
    with pytest.raises(ValueError, match=rf"{shard}: tensor {EXPERT} has shape \[24, 40\]"):
        KimiLinearForCausalLM.from_pretrained(copied)


def test_more_experts_than_the_model_has(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"num_experts": 5}))
    with pytest.raises(ValueError, match=r"safetensors: tensor model\.layers\.1\.block_sparse_moe"):
        KimiLinearForCausalLM.from_pretrained(copied)
    for name in list(index_of(copied)):
        if ".gate." in name:
            edit(copied, name, lambda tensor: tensor[:5].clone())
    with pytest.raises(ValueError, match=r"experts\.5\.w\d\.weight has no place: num_experts=5"):
        KimiLinearForCausalLM.from_pretrained(copied)


def test_missing_shard(copied):
    path = shards(copied)[2]
    path.unlink()
    with pytest.raises((ValueError, OSError), match=path.name):
        KimiLinearForCausalLM.from_pretrained(copied)


def test_truncated_shard(copied):
    path = shards(copied)[1]
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{path.name}: truncated at") as error:
        KimiLinearForCausalLM.from_pretrained(copied)
    assert any(f"tensor {name} ends" in str(error.value) for name in names)


@pytest.mark.parametrize("kept", [0, 3, 8, 40])
def test_shard_cut_inside_its_header(copied, kept):
    path = shards(copied)[1]
    os.truncate(path, kept)
    with pytest.raises(ValueError, match=f"{path.name}: not a whole safetensors file"):
        KimiLinearForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [2]}}']
)
def test_corrupt_header(copied, damage):
    path = shards(copied)[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(data[:8] + damage.ljust(length) + data[8 + length :])
    with pytest.raises(ValueError, match=f"{path.name}: the safetensors header cannot be read"):
        KimiLinearForCausalLM.from_pretrained(copied)


def write_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first_offsets(header, change):
    first = min(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    header[first]["data_offsets"] = change(*header[first]["data_offsets"])


OFFSETS = {
    "negative": lambda start, end: [start - end, 0],
    "overlapping": lambda start, end: [start + 4, end + 4],
    "float": lambda start, end: [float(start), float(end)],
    "one": lambda start, end: [start],
    "text": lambda start, end: [str(start), str(end)],
}


@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets_that_safetensors_does_not_write(copied, kind):
    """Bug: tensors were read from the header, from each other's bytes, or cut short."""
    path = shards(copied)[0]
    write_header(path, lambda header: first_offsets(header, OFFSETS[kind]))
    with pytest.raises(ValueError, match=f"{path.name}: the safetensors header cannot be read"):
        KimiLinearForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_that_are_no_floating_point_numbers(copied, dtype):
    edit(copied, PLAIN, lambda tensor: tensor.to(dtype))
    with pytest.raises(ValueError, match=rf"tensor {PLAIN} is in (I32|BOOL), the model needs"):
        KimiLinearForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_an_index_stays_in_its_folder(copied, tmp_path, is_absolute, monkeypatch):
    """Bug: a downloaded index chose which files of the machine became weights."""
    outside = tmp_path / "outside"
    outside.mkdir()
    index = copied / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for path in shards(copied):
        path.rename(outside / path.name)
    for name, file in content["weight_map"].items():
        content["weight_map"][name] = str(outside / file) if is_absolute else f"../outside/{file}"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the index names .*outside.* is outside of this folder"):
        KimiLinearForCausalLM.from_pretrained(copied)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the index names .*outside.* is outside of this folder"):
        KimiLinearForCausalLM.from_pretrained(copied.name)
    for path in outside.iterdir():  # as in a cache
        (copied / path.name).symlink_to(path)
    content["weight_map"] = {n: Path(f).name for n, f in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    KimiLinearForCausalLM.from_pretrained(copied.name)


def test_header_whose_sizes_contradict_each_other(copied):
    path = copied / index_of(copied)[PLAIN]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[PLAIN]["shape"] = [9, 40]
    path.write_bytes(
        data[:8]
        + json.dumps(header, separators=(",", ":")).encode().ljust(length)
        + data[8 + length :]
    )
    with pytest.raises(ValueError, match=f"{path.name}: .* bytes for"):
        KimiLinearForCausalLM.from_pretrained(copied)


def test_file_that_shrinks_while_it_is_read(copied, model):
    stored = stored_tensors([str(path) for path in shards(copied)], model)
    os.truncate(copied / index_of(copied)["model.norm.weight"], 100)
    with pytest.raises(OSError, match=f"{index_of(copied)['model.norm.weight']}: ends at byte"):
        stored["model.norm.weight"][...]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_ignore_mismatched_sizes(copied, model, error):
    """Transformers' callers catch a RuntimeError, ours a ValueError."""
    edit(copied, "lm_head.weight", lambda tensor: tensor[:50].clone())
    with pytest.raises(error, match="lm_head"):
        KimiLinearForCausalLM.from_pretrained(copied)
    loaded, info = KimiLinearForCausalLM.from_pretrained(
        copied, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [tuple(entry)[0] for entry in info["mismatched_keys"]] == ["lm_head.weight"]
    assert loaded.lm_head.weight.shape == model.lm_head.weight.shape
    assert loaded.lm_head.weight.std().item() == pytest.approx(STD, rel=0.1)
    assert_same_state(loaded.model, model.model)


# ---- Transformers' own class in the same process


@pytest.fixture(scope="module")
def native_model(folder) -> torch.nn.Module:
    return native.KimiLinearForCausalLM.from_pretrained(folder).eval()


def test_native_class_loads_ours(native_model, folder, model):
    assert type(native_model) is native.KimiLinearForCausalLM
    assert_close(logits(native_model), logits(model), torch.float32)


def test_native_checkpoint_loads_into_ours(native_model, model, tmp_path):
    native_model.save_pretrained(tmp_path)
    # the misnaming that makes this a case of its own
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in saved(tmp_path)
    loaded, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert_same_state(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again") == causal_layout(model.config)


def test_native_class_keeps_saving_and_loading_its_own(native_model, folder, tmp_path):
    KimiLinearForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    native_model.save_pretrained(tmp_path / "native")
    again, info = native.KimiLinearForCausalLM.from_pretrained(
        tmp_path / "native", output_loading_info=True
    )
    assert_clean(info)
    assert_same_state(again, native_model)


def test_native_conversions_are_untouched():
    registered = get_checkpoint_conversion_mapping("kimi_linear")
    fresh = _build_checkpoint_conversion_mapping()["kimi_linear"]
    assert list(map(repr, registered)) == list(map(repr, fresh))
    for name in ("KimiLinearModel", "KimiLinearForCausalLM"):
        assert get_checkpoint_conversion_mapping(name) is None


# ---- memory

MEASURE = """
import sys, threading, time
import torch
from kimi_linear import KimiLinearForCausalLM

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

def watch():
    while not done:
        peak.append(max(peak.pop(), resident()))
        time.sleep(0.0005)

KimiLinearForCausalLM.from_pretrained(sys.argv[1])  # a small one first: imports and buffers
before, done = resident(), []
peak = [before]
thread = threading.Thread(target=watch, daemon=True)
thread.start()
model = KimiLinearForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
done.append(True)
thread.join()
size = sum(p.nbytes for p in model.parameters())
print(peak[0] - before, size)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """400 MB in bfloat16, most of it experts, in shards of at most 50 MB."""
    config = tiny_config(
        hidden_size=512, moe_intermediate_size=512, num_experts=80, vocab_size=4000
    )
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    path = tmp_path_factory.mktemp("large")
    model.save_pretrained(path, max_shard_size="50MB")
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peak_memory_of_a_load(large, folder, dtype):
    """Resident memory, mapped pages of files included: the model and at most 1.2 shards more."""
    run = commands.run(["-c", MEASURE, folder, large, dtype])
    assert run.returncode == 0, run.stderr
    peak, size = map(int, run.stdout.split()[-2:])
    assert size > 350e6 and len(shards(large)) >= 8
    largest = max(path.stat().st_size for path in shards(large))
    assert peak < size + 1.2 * largest, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
