"""A bfloat16 checkpoint -> GGUF in float16, and llama.cpp's own quantization of that.

    python gguf_files.py CHECKPOINT OUT.gguf               write OUT in float16
    python gguf_files.py F16.gguf OUT.gguf Q4_0|Q4_K_M     quantize

Runs in the environment of scripts/peers/setup_llamacpp.sh. The names and the metadata are those
that llama.cpp's converter of Hugging Face checkpoints gives llama and qwen2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from math import pi
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_float16(checkpoint: Path, out: Path) -> None:
    """GGUF of a llama or qwen2 checkpoint, without a vocabulary: only token ids are ever given."""
    from gguf import GGUFWriter, LlamaFileType

    config = json.loads((checkpoint / "config.json").read_text())
    writer = GGUFWriter(out, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    if config.get("rope_scaling"):
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    for name, tensor in read_tensors(checkpoint / "model.safetensors"):
        if config["model_type"] == "llama":
            tensor = _interleaved(name, tensor, config)
        matrix = tensor.ndim > 1
        writer.add_tensor(gguf_name(name), tensor.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32) of all bfloat16 tensors of a safetensors file; numpy has no bfloat16."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", 8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        bits = data[begin:end].view(np.uint16).astype(np.uint32) << 16
        yield name, bits.view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """Of a tensor of a checkpoint."""
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_BLOCK[part]}.{kind}"


def rope_factors(config: Mapping[str, Any]) -> np.ndarray:
    """What llama3's scaling divides the frequency of each pair by, float32 [head_dim / 2].

    Long waves are stretched by the factor, short ones stay, those between are blended by how many
    of them fit into the context that the model was trained with at first.
    """
    scaling, half = config["rope_scaling"], config["head_dim"] // 2
    frequency = config["rope_theta"] ** -(np.arange(half) / half)
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / scaling["factor"])).astype(np.float32)


def _interleaved(name: str, tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """llama.cpp turns neighbours of a llama's head, checkpoints its halves: rows of q and k go from
    one order to the other.
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for part, key in heads.items():
        if part in name:
            halves = tensor.reshape(config[key], 2, -1, *tensor.shape[1:])
            return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def quantize(source: Path, out: Path, kind: str) -> None:
    """By llama.cpp's own rules for `kind`, with which some tensors get other types."""
    import llama_cpp.llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype = {"Q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M}[
        kind
    ]
    status = lib.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if status:
        sys.exit(f"llama.cpp cannot quantize {source} as {kind}: {status}")


def main() -> None:
    source, out, *kind = sys.argv[1:]
    if kind:
        quantize(Path(source), Path(out), kind[0])
    else:
        write_float16(Path(source), Path(out))


if __name__ == "__main__":
    main()
