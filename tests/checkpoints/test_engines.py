"""What is said of other engines."""

import pytest
from official import CONFIG as OFFICIAL

from kimi_linear import KimiLinearConfig, engine_problems
from kimi_linear.checkpoints.engines import ENGINES

pytestmark = pytest.mark.core

SIZES = dict(
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    kv_lora_rank=512,
    num_attention_heads=2,
    dtype="bfloat16",
)
LINEAR = {"num_heads": 2, "head_dim": 128, "short_conv_kernel_size": 4}
ALL = ("llama.cpp", "mlx-lm", "vllm", "sglang", "exllamav3")
# A field at a time, and the engines that compute it otherwise without an error, and refuse it.
CASES = {
    "rms_norm_eps": (dict(rms_norm_eps=1e-6), "vllm sglang", ""),
    "top 1": (dict(num_experts_per_token=1), "llama.cpp vllm sglang exllamav3", ""),
    "top 1 as it is": (
        dict(num_experts_per_token=1, moe_renormalize=False),
        "llama.cpp",
        "exllamav3",
    ),
    "softmax": (dict(moe_router_activation_func="softmax"), "sglang", "exllamav3"),
    "renormalize": (dict(moe_renormalize=False), "llama.cpp", "exllamav3"),
    "groups": (
        dict(num_experts=8, num_expert_group=2, topk_group=1),
        "llama.cpp mlx-lm",
        "exllamav3",
    ),
    "all groups": (dict(num_experts=8, num_expert_group=2, topk_group=2), "", "exllamav3"),
    "gelu": (dict(hidden_act="gelu"), "llama.cpp mlx-lm", "vllm sglang exllamav3"),
    "tied": (dict(tie_word_embeddings=True), "vllm sglang", "llama.cpp"),
    "q_lora_rank": (dict(q_lora_rank=64), "", "llama.cpp mlx-lm sglang"),
    "latent": (dict(kv_lora_rank=96), "", "vllm exllamav3"),
    "KDA size": (dict(linear_attn_config={**LINEAR, "head_dim": 64}), "", "exllamav3"),
    "KDA heads": (dict(linear_attn_config={**LINEAR, "num_heads": 4}), "", "llama.cpp"),
    "only KDA": (
        dict(linear_attn_config={**LINEAR, "full_attn_layers": []}),
        "",
        "llama.cpp mlx-lm",
    ),
    "no shared": (dict(num_shared_experts=0), "llama.cpp", ""),
    "none shared": (dict(num_shared_experts=None), "", "llama.cpp"),
    "many experts": (dict(num_experts=1025), "", "llama.cpp"),
    "every second": (dict(moe_layer_freq=2), "", "llama.cpp"),
    "float32": (dict(dtype="float32"), "vllm sglang", ""),
    "no experts": (dict(first_k_dense_replace=99, num_experts_per_token=1), "", ""),
}


def small(**fields):
    return KimiLinearConfig.from_preset("2m", **{**SIZES, "linear_attn_config": LINEAR, **fields})


@pytest.mark.parametrize("engine", ENGINES)
def test_the_released_model_runs_everywhere(engine):
    assert engine_problems(KimiLinearConfig(**OFFICIAL), engine) == []
    assert engine_problems(small(), engine) == []


@pytest.mark.parametrize("case", CASES)
def test_a_field_that_engines_take_otherwise(case):
    fields, silent, refused = CASES[case]
    config = small(**fields)
    for engine in ALL:
        problems = engine_problems(config, engine)
        assert any(problem.is_silent for problem in problems) == (engine in silent.split())
        assert any(not problem.is_silent for problem in problems) == (engine in refused.split())
        for problem in problems:
            assert any(name in problem.fields for name in (*fields, "layer_types"))


def test_a_field_of_a_dict_is_shown_alone():
    config = small(linear_attn_config={**LINEAR, "head_dim": 64})
    (problem,) = engine_problems(config, "exllamav3")
    assert problem.fields == "linear_attn_config['head_dim']=64"


def test_all_engines_are_here():
    assert tuple(ENGINES) == ALL


def test_what_is_silent_comes_first():
    problems = engine_problems(small(hidden_act="gelu", rms_norm_eps=1e-6), "vllm")
    assert [problem.is_silent for problem in problems] == [True, False]
    assert problems[0].fields == "rms_norm_eps=1e-06"


def test_an_unknown_engine():
    with pytest.raises(ValueError, match="^engine='ollama' is not allowed: .* llama.cpp, mlx"):
        engine_problems(small(), "ollama")
