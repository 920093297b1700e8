"""A tiny random checkpoint of every decoder family, written by transformers itself.

`tiny_models` makes the four families that are compiled, with many switches; here is one small
configuration for everything that is quantized and evaluated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

# The keys that most families share. Everything that a linear reads is a multiple of 32 wide.
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GEMMA = {**_COMMON, "head_dim": 16}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DEEPSEEK = {
    **_LATENT,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
_QWEN_VL = {
    "text_config": {
        **_COMMON,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    },
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

TINY_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON},
    "mistral": {**_COMMON, "sliding_window": 8},
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**_COMMON},
    "qwen2_moe": {
        **_COMMON,
        **_EXPERTS,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "qwen3": {**_COMMON, "head_dim": 16},
    "qwen3_moe": {**_COMMON, **_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "gemma": {**_GEMMA},
    "gemma2": {**_GEMMA, **_WINDOWED, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_GEMMA, **_WINDOWED, "query_pre_attn_scalar": 16},
    "gemma3": {
        "text_config": {**_GEMMA, **_WINDOWED, "query_pre_attn_scalar": 16},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "boi_token_index": 300,
        "eoi_token_index": 301,
        "image_token_index": 302,
    },
    "phi3": {**_COMMON, "sliding_window": 8},
    "phi": {**_COMMON},
    "stablelm": {**_COMMON, "use_qkv_bias": True},
    "starcoder2": {**_COMMON, "sliding_window": 8},
    "cohere": {**_COMMON, "logit_scale": 0.25},
    "cohere2": {**_COMMON, **_WINDOWED, "head_dim": 16, "logit_scale": 0.25},
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "max_position_embeddings": 256,
    },
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gpt2": {**_GPT2},
    "gpt_bigcode": {**_GPT2},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "gpt_neox": {**_COMMON},
    "codegen": {**_GPT2, "rotary_dim": 8},
    "internlm3": {**_COMMON, "head_dim": 16},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_DEEPSEEK},
    "minicpm3": {**_LATENT},
    "olmo": {**_COMMON, "clip_qkv": 2.0},
    "olmo2": {**_COMMON},
    "exaone4": {**_COMMON, **_WINDOWED},
    "granite": {
        **_COMMON,
        "embedding_multiplier": 4.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    "nemotron": {**_COMMON, "head_dim": 16},
    "glm": {**_COMMON, "head_dim": 16},
    "qwen2_vl": {
        **_QWEN_VL,
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 1,
        },
    },
    "qwen2_5_vl": {
        **_QWEN_VL,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
    },
    "llava": {
        "text_config": {**_COMMON, "model_type": "llama"},
        "vision_config": {
            **_SIGLIP,
            "model_type": "clip_vision_model",
            "projection_dim": 32,
            "num_hidden_layers": 2,
        },
        "image_token_index": 300,
        "image_seq_length": 4,
    },
}


def make_tiny_decoder(
    folder: Path, model_type: str, *, dtype: str = "float16", seed: int = 0, **changes: Any
) -> Path:
    """Write a random checkpoint of `model_type` to `folder`, tokenizer included, and return it.

    changes: keys of config.json that differ from TINY_DECODERS; those of a vision model's text
        side go to its text_config.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer()
    settings = dict(TINY_DECODERS[model_type])
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "text_config" in settings:
        settings["text_config"] = {**settings["text_config"], **text, **changes}
    else:
        settings |= {**text, **changes}
    model = _whole(AutoConfig.for_model(model_type, **settings))
    randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model of a checkpoint as transformers loads it, in eval mode."""
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = _auto_class(config).from_pretrained(folder, dtype=dtype).eval()
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random weights under which activations keep near unit size through every block."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind.endswith("bias"):
            parameter.normal_(0, 0.2)
        elif parameter.ndim == 1:
            # Gemma's norms multiply by 1 + weight, and begin at a weight of 0.
            centre = 0.0 if bool((parameter == 0).all()) else 1.0
            parameter.uniform_(centre - 0.5, centre + 0.5)
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            parameter.normal_(0, 0.5)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.2)


def _whole(config: Any) -> Any:
    return _auto_class(config).from_config(config, dtype=torch.float32)


def _auto_class(config: Any) -> Any:
    text = config.get_text_config()
    return AutoModelForCausalLM if text is config else AutoModelForImageTextToText
