"""Blocks whose linears read what no norm with weights has written: OLMo, and EXAONE 4 with it.

OLMo's norms have no weights. OLMo 2 and EXAONE 4 normalize what attention and MLP give, so that
these read the residual stream itself.
"""

from dataclasses import replace

from mlcawq.families.base import Architecture
from mlcawq.families.llama import READS_GATE_UP, READS_INNER, READS_QKV, READS_VALUES

_QKV, _GATE_UP = replace(READS_QKV, previous=None), replace(READS_GATE_UP, previous=None)
_POST_NORM = (_QKV, READS_VALUES, _GATE_UP, READS_INNER)

TABLES = (
    Architecture(
        model_type="olmo",
        architectures=("OlmoForCausalLM",),
        groups=(
            _QKV,
            # Clamped values are not those of scaled ones.
            replace(READS_VALUES, given=("self_attn.config.clip_qkv", None)),
            _GATE_UP,
            READS_INNER,
        ),
    ),
    Architecture(model_type="olmo2", architectures=("Olmo2ForCausalLM",), groups=_POST_NORM),
    Architecture(model_type="exaone4", architectures=("Exaone4ForCausalLM",), groups=_POST_NORM),
)
