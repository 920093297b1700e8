"""Multi-head latent attention (arXiv 2405.04434): DeepSeek V2 and V3, MiniCPM3.

Queries may, keys and values always do come from low-rank latents with norms of their own;
`kv_b_proj` makes of each head's latent its key, then its value.
"""

from mlcawq.families.base import Architecture, ScalingGroup
from mlcawq.families.llama import GATE_UP, READS_INNER

_GROUPS = (
    ScalingGroup(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "self_attn",
    ),
    ScalingGroup("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), "self_attn.q_b_proj"),
    ScalingGroup("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "self_attn.kv_b_proj"),
    ScalingGroup(
        "self_attn.kv_b_proj", ("self_attn.o_proj",), "self_attn.o_proj", rows="v_after_k"
    ),
    ScalingGroup(
        "post_attention_layernorm",
        (
            *GATE_UP,
            "mlp.experts.*.gate_proj",
            "mlp.experts.*.up_proj",
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
        ),
        "mlp",
        also=("mlp.gate",),
    ),
    READS_INNER,
    ScalingGroup("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), "mlp.experts.*.down_proj"),
    ScalingGroup(
        "mlp.shared_experts.up_proj",
        ("mlp.shared_experts.down_proj",),
        "mlp.shared_experts.down_proj",
    ),
)

TABLES = (
    Architecture(
        model_type="deepseek_v2", architectures=("DeepseekV2ForCausalLM",), groups=_GROUPS
    ),
    Architecture(
        model_type="deepseek_v3", architectures=("DeepseekV3ForCausalLM",), groups=_GROUPS
    ),
    Architecture(model_type="minicpm3", architectures=("MiniCPM3ForCausalLM",), groups=_GROUPS),
)
