"""Configurations of FLA's kernels: made by `benchmarks/tune_fla.py`, read by `tuning.py`."""

from typing import Any

CAPABILITY = (9, 0)
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "fla.modules.causal_conv1d.ops.causal_conv1d_bwd_kernel": {
        "W=4 bfloat16 float32": {"kwargs": {"BD": 32}, "num_stages": 3, "num_warps": 4}
    },
    "fla.modules.causal_conv1d.ops.causal_conv1d_fwd_kernel": {
        "W=4 bfloat16": {"kwargs": {"BD": 64}, "num_stages": 3, "num_warps": 4}
    },
    "fla.modules.norm.fused_norm_gate.layer_norm_gated_bwd_kernel": {
        "D=128 IS_RMS_NORM HAS_WEIGHT bfloat16 float32": {
            "kwargs": {"BT": 64},
            "num_stages": 3,
            "num_warps": 16,
        }
    },
    "fla.modules.norm.fused_norm_gate.layer_norm_gated_fwd_kernel": {
        "D=128 IS_RMS_NORM HAS_WEIGHT bfloat16 float32": {
            "kwargs": {"BT": 16},
            "num_stages": 3,
            "num_warps": 4,
        }
    },
    "fla.modules.norm.l2norm.l2norm_bwd_kernel": {
        "D=128 bfloat16 float32": {"kwargs": {"BT": 8}, "num_stages": 3, "num_warps": 4}
    },
    "fla.modules.norm.l2norm.l2norm_fwd_kernel": {
        "D=128 bfloat16 float32": {"kwargs": {"BT": 8}, "num_stages": 3, "num_warps": 1}
    },
    "fla.ops.common.chunk_delta_h.chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": {
        "K=128 V=128 BT=64 bfloat16 float32": {
            "kwargs": {"BV": 32},
            "num_stages": 3,
            "num_warps": 4,
        }
    },
    "fla.ops.common.chunk_delta_h.chunk_gated_delta_rule_fwd_kernel_h_blockdim64": {
        "K=128 V=128 BT=64 bfloat16 float32": {
            "kwargs": {"BV": 32},
            "num_stages": 4,
            "num_warps": 4,
        }
    },
    "fla.ops.gla.chunk.chunk_gla_fwd_kernel_o": {
        "BT=64 K=128 V=128 bfloat16 float32": {
            "kwargs": {"BK": 64, "BV": 128},
            "num_stages": 2,
            "num_warps": 4,
        }
    },
    "fla.ops.kda.chunk_bwd.chunk_kda_bwd_kernel_dAv": {
        "K=128 V=128 BT=64 BK=128 BV=128 bfloat16 float32": {
            "kwargs": {},
            "num_stages": 2,
            "num_warps": 4,
        }
    },
    "fla.ops.kda.chunk_bwd.chunk_kda_bwd_kernel_wy_dqkg_fused": {
        "BT=64 K=128 V=128 bfloat16 float32": {
            "kwargs": {"BK": 64, "BV": 64},
            "num_stages": 3,
            "num_warps": 4,
        }
    },
    "fla.ops.kda.chunk_intra.chunk_kda_bwd_kernel_intra": {
        "BK=32 NC=4 BT=64 bfloat16 float32": {"kwargs": {}, "num_stages": 3, "num_warps": 2}
    },
    "fla.ops.kda.chunk_intra.chunk_kda_fwd_kernel_inter_solve_fused": {
        "K=128 BT=64 BC=16 NC=4 bfloat16 float32": {
            "kwargs": {"BK": 32},
            "num_stages": 3,
            "num_warps": 1,
        }
    },
    "fla.ops.kda.chunk_intra_token_parallel.chunk_kda_fwd_kernel_intra_token_parallel": {
        "K=128 bfloat16 float32": {"kwargs": {"BH": 2}, "num_stages": 3, "num_warps": 1}
    },
    "fla.ops.kda.gate.kda_gate_bwd_kernel": {
        "D=128 bfloat16 float32": {"kwargs": {}, "num_stages": 2, "num_warps": 4}
    },
    "fla.ops.kda.gate.kda_gate_chunk_cumsum_vector_kernel": {
        "S=128 BT=64 IS_VARLEN bfloat16 float32": {
            "kwargs": {"BS": 64},
            "num_stages": 3,
            "num_warps": 2,
        },
        "S=128 BT=64 bfloat16 float32": {"kwargs": {"BS": 64}, "num_stages": 3, "num_warps": 4},
    },
    "fla.ops.kda.wy_fast.recompute_w_u_fwd_kda_kernel": {
        "K=128 V=128 BT=64 BK=64 BV=64 IS_VARLEN bfloat16 float32": {
            "kwargs": {},
            "num_stages": 3,
            "num_warps": 8,
        },
        "K=128 V=128 BT=64 BK=64 BV=64 bfloat16 float32": {
            "kwargs": {},
            "num_stages": 3,
            "num_warps": 4,
        },
    },
    "fla.ops.utils.cumsum.chunk_local_cumsum_vector_kernel": {
        "S=128 BT=64 IS_VARLEN REVERSE float32": {
            "kwargs": {"BS": 32},
            "num_stages": 3,
            "num_warps": 2,
        },
        "S=128 BT=64 REVERSE float32": {"kwargs": {"BS": 32}, "num_stages": 3, "num_warps": 2},
    },
}
