"""One random model for all contenders: a bfloat16 checkpoint, and its linears rounded to int4.

Everybody's files are made from the same weights, so that the contenders compute the same function
up to their rounding, which is checked before anything is timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.cpu.shapes import Shape
from tir_kernels.reference import pack

GROUP_SIZE = 128
# The head and the embedding are one matrix in both shapes: its spread makes logits of unit size.
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_source(shape: Shape, folder: Path) -> None:
    """A Hugging Face folder in bfloat16, as the released models are."""
    random = torch.Generator().manual_seed(0)

    def normal(*size: int, spread: float) -> torch.Tensor:
        return (torch.randn(size, generator=random) * spread).bfloat16()

    hidden = int(shape.config["hidden_size"])
    state = {
        "model.embed_tokens.weight": normal(shape.vocabulary, hidden, spread=hidden**-0.5),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for i in range(shape.layers):
        block = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{block}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, (n, k) in shape.linears().items():
            state[f"{block}.{name}.weight"] = normal(n, k, spread=k**-0.5)
            if name in shape.biased:
                state[f"{block}.{name}.bias"] = normal(n, spread=0.1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(folder, {**shape.config, "torch_dtype": "bfloat16"})
    _write_tokenizer(folder)


def write_awq(source: Path, folder: Path) -> None:
    """The checkpoint `source` with its linears rounded to nearest, as AWQ stores them."""
    config = json.loads((source / "config.json").read_text())
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            linear = name.removesuffix(".weight")
            state |= {f"{linear}.{key}": value for key, value in _rounded(tensor.float())}
        else:
            state[name] = tensor.half()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "zero_point": True,
        "version": "gemm",
    }
    config = {**config, "torch_dtype": "float16", "quantization_config": quantization}
    _write_config(folder, config)
    _write_tokenizer(folder)


def _rounded(weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """float32 [N, K] -> qweight, qzeros, scales."""
    n, k = weight.shape
    groups = weight.T.reshape(k // GROUP_SIZE, GROUP_SIZE, n)
    high, low = groups.amax(1), groups.amin(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    q = (groups / scales.float()[:, None]).round() + zeros[:, None]
    q = q.clamp(0, 15).reshape(k, n)
    yield "qweight", torch.from_numpy(pack(q.to(torch.uint8).numpy()))
    yield "qzeros", torch.from_numpy(pack(zeros.to(torch.uint8).numpy()))
    yield "scales", scales.contiguous()


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, and ChatML's: enough to build a folder and to start chatting."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
