"""Mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE.

All experts, the router and what is computed for every token read one tensor.
"""

from mlcawq.families.base import Architecture, ScalingGroup
from mlcawq.families.llama import GATE_UP, READS_INNER, READS_QKV, READS_VALUES

_MIXTRAL = (
    READS_QKV,
    READS_VALUES,
    ScalingGroup(
        "post_attention_layernorm",
        ("mlp.experts.*.w1", "mlp.experts.*.w3"),
        "mlp",
        also=("mlp.gate",),
    ),
    ScalingGroup("mlp.experts.*.w3", ("mlp.experts.*.w2",), "mlp.experts.*.w2"),
)

# With a shared expert, or none; layers without experts are llama's.
_QWEN = (
    READS_QKV,
    READS_VALUES,
    ScalingGroup(
        "post_attention_layernorm",
        (
            *GATE_UP,
            "mlp.experts.*.gate_proj",
            "mlp.experts.*.up_proj",
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
        ),
        "mlp",
        also=("mlp.gate", "mlp.shared_expert_gate"),
    ),
    READS_INNER,
    ScalingGroup("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), "mlp.experts.*.down_proj"),
    ScalingGroup(
        "mlp.shared_expert.up_proj",
        ("mlp.shared_expert.down_proj",),
        "mlp.shared_expert.down_proj",
    ),
)

TABLES = (
    Architecture(model_type="mixtral", architectures=("MixtralForCausalLM",), groups=_MIXTRAL),
    Architecture(model_type="qwen2_moe", architectures=("Qwen2MoeForCausalLM",), groups=_QWEN),
    Architecture(model_type="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), groups=_QWEN),
)
