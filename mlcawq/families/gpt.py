"""Decoders with a plain MLP: linear, activation, linear.

GELU and its like are not homogeneous: no scale passes them, and the second linear has none. ReLU
is, max(0, x / s) = max(0, x) / s, and OPT's second linear takes one.
"""

from mlcawq.families.base import Architecture, ScalingGroup
from mlcawq.families.llama import READS_QKV, READS_VALUES

_BIGCODE = Architecture(
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    groups=(
        ScalingGroup("ln_1", ("attn.c_attn",), "attn"),
        # Of one key and value for all queries, or of as many: a group or a head at a time.
        ScalingGroup("attn.c_attn", ("attn.c_proj",), "attn.c_proj", rows="v_grouped"),
        ScalingGroup("ln_2", ("mlp.c_fc",), "mlp"),
        ScalingGroup(None, ("mlp.c_proj",), "mlp.c_proj"),
    ),
    block="transformer.h.{}",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
)

_STARCODER2 = Architecture(
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    groups=(
        READS_QKV,
        READS_VALUES,
        ScalingGroup("post_attention_layernorm", ("mlp.c_fc",), "mlp"),
        ScalingGroup(None, ("mlp.c_proj",), "mlp.c_proj"),
    ),
)

_NEMOTRON = Architecture(
    model_type="nemotron",
    architectures=("NemotronForCausalLM",),
    groups=(
        READS_QKV,
        READS_VALUES,
        ScalingGroup("post_attention_layernorm", ("mlp.up_proj",), "mlp"),
        # relu(x)^2 takes a scale's square through, which is no linear's to absorb alone.
        ScalingGroup(None, ("mlp.down_proj",), "mlp.down_proj"),
    ),
)

_MPT = Architecture(
    model_type="mpt",
    architectures=("MptForCausalLM",),
    groups=(
        ScalingGroup("norm_1", ("attn.Wqkv",), "attn"),
        ScalingGroup(
            "attn.Wqkv",
            ("attn.out_proj",),
            "attn.out_proj",
            rows="v_concatenated",
            given=("attn.clip_qkv", None),
        ),
        ScalingGroup("norm_2", ("ffn.up_proj",), "ffn"),
        ScalingGroup(None, ("ffn.down_proj",), "ffn.down_proj"),
    ),
    block="transformer.blocks.{}",
    embedding="transformer.wte",
    final_norm="transformer.norm_f",
)

_OPT = Architecture(
    model_type="opt",
    architectures=("OPTForCausalLM",),
    groups=(
        ScalingGroup(
            "self_attn_layer_norm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn",
            given=("do_layer_norm_before", True),
        ),
        ScalingGroup("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
        ScalingGroup("final_layer_norm", ("fc1",), "fc1", given=("do_layer_norm_before", True)),
        ScalingGroup(
            "fc1", ("fc2",), "fc2", given=("self_attn.config.activation_function", "relu")
        ),
    ),
    block="model.decoder.layers.{}",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
)

_BLOOM = Architecture(
    model_type="bloom",
    architectures=("BloomForCausalLM",),
    groups=(
        # What the norms give may be the residual stream at once.
        ScalingGroup(
            "input_layernorm",
            ("self_attention.query_key_value",),
            "self_attention",
            given=("apply_residual_connection_post_layernorm", False),
        ),
        ScalingGroup(
            "self_attention.query_key_value",
            ("self_attention.dense",),
            "self_attention.dense",
            rows="v_grouped",
        ),
        ScalingGroup(
            "post_attention_layernorm",
            ("mlp.dense_h_to_4h",),
            "mlp",
            given=("apply_residual_connection_post_layernorm", False),
        ),
        ScalingGroup(None, ("mlp.dense_4h_to_h",), "mlp.dense_4h_to_h"),
    ),
    block="transformer.h.{}",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
)

_NEOX = Architecture(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    groups=(
        ScalingGroup("input_layernorm", ("attention.query_key_value",), "attention"),
        ScalingGroup(
            "attention.query_key_value",
            ("attention.dense",),
            "attention.dense",
            rows="v_grouped",
        ),
        ScalingGroup("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
        ScalingGroup(None, ("mlp.dense_4h_to_h",), "mlp.dense_4h_to_h"),
    ),
    block="gpt_neox.layers.{}",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)

TABLES = (_BIGCODE, _STARCODER2, _NEMOTRON, _MPT, _OPT, _BLOOM, _NEOX)
