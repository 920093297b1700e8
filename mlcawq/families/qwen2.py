"""Qwen 2 and 2.5 (Qwen2ForCausalLM): q, k and v always carry a bias."""

from mlcawq.families.base import Family
from mlcawq.families.llama import LLAMA_GROUPS, LLAMA_LINEARS

QWEN_FUSIONS = {
    "self_attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    linears=LLAMA_LINEARS,
    groups=LLAMA_GROUPS,
    fusions=QWEN_FUSIONS,
    mlc_model_type="qwen2",
    biases={"qkv": True},
    sliding_window="opt-in",
)
