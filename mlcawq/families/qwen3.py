"""Qwen 3 dense (Qwen3ForCausalLM): RMS norms on the heads of q and k, before rotation."""

from mlcawq.families.base import Family
from mlcawq.families.llama import LLAMA_GROUPS, LLAMA_LINEARS
from mlcawq.families.qwen2 import QWEN_FUSIONS

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    linears=LLAMA_LINEARS,
    groups=LLAMA_GROUPS,
    fusions=QWEN_FUSIONS,
    mlc_model_type="qwen3",
    qk_norm=True,
    biases={"qkv": "attention_bias", "o": "attention_bias"},
    sliding_window="opt-in",
)
