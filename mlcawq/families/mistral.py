"""Mistral 7B and its successors of the same architecture (MistralForCausalLM)."""

from mlcawq.families.base import Family
from mlcawq.families.llama import LLAMA_FUSIONS, LLAMA_GROUPS, LLAMA_LINEARS

FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    linears=LLAMA_LINEARS,
    groups=LLAMA_GROUPS,
    fusions=LLAMA_FUSIONS,
    mlc_model_type="mistral",
    sliding_window="always",
)
