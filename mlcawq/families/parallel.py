"""Attention and MLP side by side, reading one norm: Cohere, GPT-J, Phi, and StableLM where set."""

from mlcawq.families.base import Architecture, ScalingGroup
from mlcawq.families.llama import (
    GATE_UP,
    LLAMA_GROUPS,
    QKV,
    READS_INNER,
    READS_VALUES,
)

_GATED = (
    ScalingGroup("input_layernorm", (*QKV, *GATE_UP), "self_attn", beside=("mlp",)),
    READS_VALUES,
    READS_INNER,
)

TABLES = (
    Architecture(model_type="cohere", architectures=("CohereForCausalLM",), groups=_GATED),
    Architecture(model_type="cohere2", architectures=("Cohere2ForCausalLM",), groups=_GATED),
    Architecture(
        model_type="stablelm",
        architectures=("StableLmForCausalLM",),
        groups=LLAMA_GROUPS,
        layouts=(_GATED,),
    ),
    Architecture(
        model_type="phi",
        architectures=("PhiForCausalLM",),
        groups=(
            ScalingGroup("input_layernorm", (*QKV, "mlp.fc1"), "self_attn", beside=("mlp",)),
            ScalingGroup("self_attn.v_proj", ("self_attn.dense",), "self_attn.dense"),
            ScalingGroup(None, ("mlp.fc2",), "mlp.fc2"),
        ),
        final_norm="model.final_layernorm",
    ),
    Architecture(
        model_type="gptj",
        architectures=("GPTJForCausalLM",),
        groups=(
            ScalingGroup(
                "ln_1",
                ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
                "attn",
                beside=("mlp",),
            ),
            ScalingGroup("attn.v_proj", ("attn.out_proj",), "attn.out_proj"),
            ScalingGroup(None, ("mlp.fc_out",), "mlp.fc_out"),
        ),
        block="transformer.h.{}",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
    ),
)
