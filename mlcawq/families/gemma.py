"""Gemma 1 to 3: norms that multiply by 1 + weight; from the second on, norms after as well.

A norm after attention or MLP works on what is added to the residual stream, which nothing can
absorb a scale from: only the norms before are of interest here.
"""

from dataclasses import replace

from mlcawq.families.base import Architecture
from mlcawq.families.llama import (
    LLAMA_GROUPS,
    READS_GATE_UP,
    READS_INNER,
    READS_QKV,
    READS_VALUES,
)

SANDWICHED = (
    READS_QKV,
    READS_VALUES,
    replace(READS_GATE_UP, previous="pre_feedforward_layernorm"),
    READS_INNER,
)

TABLES = (
    Architecture(model_type="gemma", architectures=("GemmaForCausalLM",), groups=LLAMA_GROUPS),
    Architecture(model_type="gemma2", architectures=("Gemma2ForCausalLM",), groups=SANDWICHED),
    Architecture(model_type="gemma3_text", architectures=("Gemma3ForCausalLM",), groups=SANDWICHED),
)
