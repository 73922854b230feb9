"""State-space models, linear attention and their hybrids, of transformers."""

from __future__ import annotations

from typing import Any

from families._family import Family, text
from families._text import families

TABLE: dict[str, dict[str, Any]] = {
    "Mamba": {"time_step_rank": 8},
    "Mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "FalconMamba": {"time_step_rank": 8},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "Bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 16, "attn_layer_indices": [1]},
    "Zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_dt_rank": 8,
        "num_key_value_heads": 4,
    },
    "Zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "NemotronH": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 64,
    },
    "FalconH1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "RecurrentGemma": {"num_hidden_layers": 3},
    "Lfm2": {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    "xLSTM": {"num_heads": 4, "qk_dim_factor": 1.0, "ffn_round_up_to_multiple_of": 8, "chunk_size": 16},
    "Rwkv": {"attention_hidden_size": 64},
    "OlmoHybrid": {},
    "KimiLinear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "q_lora_rank": None,
        "num_key_value_heads": 4,
    },
}

HYBRIDS: tuple[Family, ...] = tuple(families("state space and hybrid", text, TABLE, "ForCausalLM"))
