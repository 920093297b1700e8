"""Llama 1 to 3.x (LlamaForCausalLM), and the block layout that its descendants share."""

from mlcawq.families.base import Family, ScalingGroup

LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LLAMA_GROUPS = (
    ScalingGroup(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn",
    ),
    ScalingGroup("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
    ScalingGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ScalingGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
)
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
