"""Tiny random checkpoints of families that mlc_llm runs and we have no table of, and their AWQ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from awq_checkpoints import round_weight
from safetensors.torch import save_file
from tiny_models import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tir_kernels.reference import dequantize, pack

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_HEADS = {"num_key_value_heads": 4}  # families of mlc_llm without grouped heads
_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 256}
# What each family needs beside _COMMON, or in place of it (a None takes a key away).
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.25},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "tie_word_embeddings": True, "sliding_window": 256},
    "gemma3_text": {"head_dim": 32, "tie_word_embeddings": True, "sliding_window": 256},
    "gpt_neox": {"rotary_pct": 0.25},
    "mistral": {"sliding_window": 256},
    "nemotron": {"hidden_act": "relu2"},
    "olmo": {},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0},
    "stablelm": {"use_qkv_bias": True, **_HEADS},
    "starcoder2": {"use_bias": True, "tie_word_embeddings": True},
}


def make_family(folder: Path, family: str, **changes: Any) -> Path:
    """A random float16 checkpoint, as transformers writes it."""
    tokenizer = make_tokenizer()
    settings = {**_COMMON, **FAMILIES[family], **changes}
    settings |= {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": 0,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(len(family))
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_awq_pair(source: Path, group_size: int) -> tuple[Path, Path]:
    """The checkpoint with the linears of its blocks quantized by rounding, and the unquantized one
    that this stands for, in float16.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    from safetensors.torch import load_file

    state = load_file(source / "model.safetensors")
    plain = dict(state)
    for name in linears:
        weight = state.pop(f"{name}.weight").float().numpy().T
        q, zeros, scales = round_weight(weight, group_size, True)
        words = pack(q), pack(zeros)
        for part, array in zip(("qweight", "qzeros", "scales"), (*words, scales), strict=True):
            state[f"{name}.{part}"] = torch.from_numpy(array)
        dequantized = dequantize(*words, scales, np.float32).T.astype(np.float16)
        plain[f"{name}.weight"] = torch.from_numpy(dequantized.copy())
    folders = []
    for kind, tensors in (("awq", state), ("plain", plain)):
        folder = source.with_name(f"{source.name}-{kind}")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors")
        folders.append(folder)
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    (folders[0] / "config.json").write_text(json.dumps(config, indent=2))
    return folders[0], folders[1]
