"""How Transformers divides the model among processes: the plans of the backbone's modules.

`from_pretrained(..., distributed_config=DistributedConfig(tp_size=N))` applies the first one,
`ep_size=N` (Transformers 5.17: `enable_expert_parallel=True`) the second, `pp_size=N` the third.
The styles "kimi_linear_*" are in `parallel/tensor.py`; `upstream/models.py` says the second plan
in the words of 5.17.
"""

REGION = "kimi_linear_region"
SPLIT = "kimi_linear_split_{}"  # which dimension of a parameter
SPLIT_GATE_UP = "packed_colwise"  # Transformers': each half of the features by itself

# rows that belong to heads: of KDA, and of MLA
KDA_ROWS = (
    "k_proj",
    "v_proj",
    "q_conv1d",
    "k_conv1d",
    "v_conv1d",
    "b_proj",
    "f_b_proj",
    "g_b_proj",
)
HEAD_ROWS = ("q_proj", *KDA_ROWS, "dt_bias", "q_b_proj", "kv_b_proj")


def _mlp(name: str) -> dict[str, str]:
    return {
        name: REGION,
        f"{name}.gate_proj": SPLIT.format(0),
        f"{name}.up_proj": SPLIT.format(0),
        f"{name}.down_proj": SPLIT.format(1),
    }


ATTENTION, MOE = "layers.*.self_attn", "layers.*.block_sparse_moe"
TP_PLAN = {
    "embed_tokens": "embedding_rowwise",
    ATTENTION: REGION,  # of either kind: each process has some of the heads
    **{f"{ATTENTION}.{name}": SPLIT.format(0) for name in HEAD_ROWS},
    f"{ATTENTION}.A_log": SPLIT.format(2),  # [1, 1, H, 1]
    f"{ATTENTION}.o_proj": SPLIT.format(1),
    **_mlp("layers.*.mlp"),
    **_mlp(f"{MOE}.shared_experts"),
    f"{MOE}.experts": REGION,  # each process has a part of every expert
    f"{MOE}.experts.gate_up_proj": SPLIT_GATE_UP,
    f"{MOE}.experts.down_proj": SPLIT.format(2),
}

# Each process has some of the experts, whole.
EP_PLAN = {
    f"{MOE}.experts.gate_up_proj": "grouped_gemm",
    f"{MOE}.experts.down_proj": "grouped_gemm",
    f"{MOE}.experts": "ep_dispatch_experts",
}

PP_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}
