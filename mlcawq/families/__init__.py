"""The architectures that mlcawq knows, a file each or a few relatives, and what follows.

`ARCHITECTURES` can be quantized; those of them that can be compiled too are `FAMILIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlcawq.errors import UserError
from mlcawq.families import (
    falcon,
    fused,
    gemma,
    gpt,
    latent,
    llama,
    mistral,
    mixtures,
    olmo,
    parallel,
    qwen2,
    qwen3,
    vision_language,
)
from mlcawq.families.base import Architecture, Family, ScalingGroup

if TYPE_CHECKING:
    from mlcawq.checkpoint.config import ModelConfig

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Architecture",
    "Family",
    "ScalingGroup",
    "expected_tensors",
    "family_of",
    "find_family",
    "linear_biases",
    "linear_shapes",
]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)
}

ARCHITECTURES: dict[str, Architecture] = {
    **FAMILIES,
    **{
        table.model_type: table
        for tables in (
            llama,
            gemma,
            mixtures,
            latent,
            fused,
            parallel,
            olmo,
            gpt,
            falcon,
            vision_language,
        )
        for table in tables.TABLES
    },
}


def family_of(model_type: Any, where: str = "config.json") -> Family:
    """The table for config.json's `model_type`. Raises UserError naming the supported ones."""
    if model_type not in FAMILIES:
        raise UserError.one(
            f"model_type {model_type!r} is not supported",
            where,
            f"supported families: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def find_family(config: ModelConfig) -> Family:
    """The table for a config that was read."""
    return family_of(config.model_type)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear of a block, by its name in the block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {name: shapes[name] for name in find_family(config).linears}


def linear_biases(config: ModelConfig) -> dict[str, bool]:
    """Whether each linear of a block has a bias, by its name in the block."""

    def biased(name: str) -> bool:
        if name.startswith("mlp."):
            return config.mlp_bias
        return config.o_bias if name == "self_attn.o_proj" else config.attention_bias

    return {name: biased(name) for name in find_family(config).linears}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the unquantized checkpoint and its shape, by transformers' name.

    A tied head is left out: it is the embedding.
    """
    family = find_family(config)
    hidden = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {
        f"{family.embedding}.weight": (config.vocab_size, hidden)
    }
    shapes, biases = linear_shapes(config), linear_biases(config)
    for i in range(config.num_hidden_layers):
        block = family.block.format(i)
        for name, (in_features, out_features) in shapes.items():
            tensors[f"{block}.{name}.weight"] = (out_features, in_features)
            if biases[name]:
                tensors[f"{block}.{name}.bias"] = (out_features,)
        for norm in family.norms:
            tensors[f"{block}.{norm}.weight"] = (hidden,)
        if config.qk_norm:
            tensors[f"{block}.self_attn.q_norm.weight"] = (config.head_dim,)
            tensors[f"{block}.self_attn.k_norm.weight"] = (config.head_dim,)
    tensors[f"{family.final_norm}.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors[f"{family.head}.weight"] = (config.vocab_size, hidden)
    return tensors
