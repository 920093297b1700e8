"""Qwen 2 and 2.5 (Qwen2ForCausalLM): q, k and v always carry a bias."""

from mlcawq.families.base import Family
from mlcawq.families.llama import LLAMA_FUSIONS, LLAMA_GROUPS, LLAMA_LINEARS

FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    linears=LLAMA_LINEARS,
    groups=LLAMA_GROUPS,
    fusions=LLAMA_FUSIONS,
    mlc_model_type="qwen2",
    biases={"qkv": True},
    sliding_window="opt-in",
)
