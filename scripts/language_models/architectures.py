"""What is trained: one shape of 11 to 13 million parameters in several architectures.

Every linear takes a multiple of 128 inputs. They differ where quantizers meet differences: shared
or own key-value heads, norms of queries and keys, norms after the sublayers, LayerNorm, biases and
one linear for queries, keys and values.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from scripts.demo_model import attention

VOCABULARY = 4096
LONGEST = 512  # positions
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "use_cache": False,
}
_GATED: dict[str, Any] = {**_SHAPE, "intermediate_size": 1024, "head_dim": 64}

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GATED, num_attention_heads=6, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_GATED, num_attention_heads=6, num_key_value_heads=6),
    "gemma2": Gemma2Config(
        **_GATED,
        num_attention_heads=6,
        num_key_value_heads=3,
        query_pre_attn_scalar=64,
        sliding_window=LONGEST,
    ),
    "gpt_neox": GPTNeoXConfig(**_SHAPE, intermediate_size=1536, num_attention_heads=6),
}


def new_model(name: str) -> PreTrainedModel:
    """The architecture with random weights, in float32, made from PyTorch's seed."""
    # gemma2 bounds its attention scores, which transformers' own attention alone does.
    implementation = "eager" if name == "gemma2" else attention.NAME
    config = copy.deepcopy(ARCHITECTURES[name])  # from_config writes into it
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
