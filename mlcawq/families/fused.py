"""Llama's block with linears fused in the checkpoint: Phi-3 and GLM-4."""

from mlcawq.families.base import Architecture, ScalingGroup
from mlcawq.families.llama import READS_QKV, READS_VALUES

_GATE_UP = ScalingGroup("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp")
_INNER = ScalingGroup("mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj", rows="second_half")

TABLES = (
    Architecture(
        model_type="phi3",
        architectures=("Phi3ForCausalLM",),
        groups=(
            ScalingGroup("input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
            ScalingGroup(
                "self_attn.qkv_proj",
                ("self_attn.o_proj",),
                "self_attn.o_proj",
                rows="v_concatenated",
            ),
            _GATE_UP,
            _INNER,
        ),
    ),
    Architecture(
        model_type="glm",
        architectures=("GlmForCausalLM",),
        groups=(READS_QKV, READS_VALUES, _GATE_UP, _INNER),
    ),
)
