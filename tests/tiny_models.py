"""Small random checkpoints of each family, written by transformers: the tests' raw material."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = [
    "The quick brown fox jumps over the lazy dog while seven wizards box.",
    "Paris is the capital of France. Water boils at 100 degrees Celsius.",
    "def add(a, b):\n    return a + b\n",
    "Größe, naïve café, 東京, emoji 🙂 and symbols {}[]<>|&%$#@!",
]

# One rope setting of every type that transformers has for these families.
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    # short and long factors are filled in by make_tiny_model: one per pair of a head
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 256},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


def make_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    tie: bool = False,
    bias: bool | None = None,
    rope: dict[str, Any] | str | None = None,
    layers: int = 2,
    hidden: int = 128,
    intermediate: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    context: int = 1024,
    dtype: str = "float16",
    seed: int = 0,
    config_form: int = 5,
    chat_template: bool = True,
    outliers: float = 1.0,
    **extra: Any,
) -> Path:
    """Write a random checkpoint to `folder` and return it.

    bias: attention_bias, where the family has the switch.
    rope: transformers' rope parameters without theta, or the name of one in ROPES.
    config_form: 5 leaves config.json as transformers 5 writes it, 4 rewrites it to the old keys.
    outliers: factor by which a few channels of the norms grow, with the columns that read them
        divided by it, so that the function stays and activations get outlier channels.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer()
    head_dim = head_dim or hidden // heads
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "tie_word_embeddings": tie,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "rms_norm_eps": 1e-5,
        **extra,
    }
    if family == "mistral":
        settings.setdefault("sliding_window", None)
    if bias is not None and family in ("llama", "qwen3"):
        settings["attention_bias"] = bias
    given = ROPES[rope] if isinstance(rope, str) else rope
    if given is not None:
        given = dict(given)
        if given["rope_type"] == "longrope":
            pairs = head_dim // 2
            given.setdefault("short_factor", [1.0 + 0.02 * i for i in range(pairs)])
            given.setdefault("long_factor", [1.0 + 0.2 * i for i in range(pairs)])
        settings["rope_parameters"] = {**given, "rope_theta": 10000.0}
    config = AutoConfig.for_model(family, **settings)

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(0, 0.5)
            else:  # keeps activations near unit size through every block
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        if outliers != 1.0:
            _add_outliers(model, outliers)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if not chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    if config_form == 4:
        _to_old_form(folder / "config.json")
    return folder


def _add_outliers(model: torch.nn.Module, factor: float) -> None:
    for block in model.model.layers:
        for norm, readers in (
            (
                block.input_layernorm,
                (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            ),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            channels = torch.randperm(norm.weight.numel())[: max(2, norm.weight.numel() // 32)]
            norm.weight[channels] *= factor
            for linear in readers:
                linear.weight[:, channels] /= factor


def _to_old_form(path: Path) -> None:
    """transformers 5's config.json with transformers 4's keys."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    path.write_text(json.dumps(config, indent=2))
