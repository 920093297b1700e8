"""Llama 1 to 3.x (LlamaForCausalLM), and the block layout that its descendants share."""

from mlcawq.families.base import Architecture, Family, ScalingGroup

LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
QKV = LLAMA_LINEARS[:3]
GATE_UP = LLAMA_LINEARS[4:6]
READS_QKV = ScalingGroup("input_layernorm", QKV, "self_attn")
READS_VALUES = ScalingGroup("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj")
READS_GATE_UP = ScalingGroup("post_attention_layernorm", GATE_UP, "mlp")
READS_INNER = ScalingGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
LLAMA_GROUPS = (READS_QKV, READS_VALUES, READS_GATE_UP, READS_INNER)
LLAMA_FUSIONS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    linears=LLAMA_LINEARS,
    groups=LLAMA_GROUPS,
    fusions=LLAMA_FUSIONS,
    mlc_model_type="llama",
    biases={"qkv": "attention_bias", "o": "attention_bias", "mlp": "mlp_bias"},
)

# Others whose blocks have llama's modules.
TABLES = (
    Architecture(
        model_type="internlm3",
        architectures=("InternLM3ForCausalLM", "LlamaForCausalLM"),
        groups=LLAMA_GROUPS,
    ),
    Architecture(model_type="granite", architectures=("GraniteForCausalLM",), groups=LLAMA_GROUPS),
)
