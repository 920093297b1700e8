"""The models that are measured: shapes of released ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
}
# For trying the benchmark itself; its times say nothing.
TINY: dict[str, Any] = {
    **LLAMA_1B,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


@dataclass(frozen=True)
class Shape:
    """config: as config.json has it, without a type of weights."""

    name: str
    title: str
    config: dict[str, Any]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    def linears(self) -> dict[str, tuple[int, int]]:
        """Of a decoder block, by the name that checkpoints have for it: [out, in]."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        width = self.config["head_dim"]
        q, kv = (self.config[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
        return {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def biased(self) -> tuple[str, ...]:
        """The linears that have a bias."""
        if self.config["model_type"] != "qwen2":
            return ()
        return tuple(f"self_attn.{kind}_proj" for kind in "qkv")

    @property
    def cached(self) -> int:
        """Elements of keys and values, for one token in all layers."""
        heads = self.config["num_key_value_heads"]
        return 2 * self.layers * int(heads) * int(self.config["head_dim"])


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", "1B llama (Llama 3.2)", LLAMA_1B),
        Shape("qwen-0.5b", "0.5B qwen2 (Qwen2.5)", QWEN_05B),
        Shape("tiny", "tiny llama", TINY),
    )
}
