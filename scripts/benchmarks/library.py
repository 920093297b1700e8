"""A compiled library with random parameters: what a contest between libraries needs of a model."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm_ffi import Shape

from benchmarks.cpu.shapes import LLAMA_1B
from mlcawq.checkpoint.config import ModelConfig, parse_config


def model_config(layers: int) -> ModelConfig:
    """Of the 1B llama with so many blocks, quantized by AWQ in groups of 128."""
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    }
    changes = {"num_hidden_layers": layers, "quantization_config": quantization}
    return parse_config({**LLAMA_1B, "torch_dtype": "float16", **changes})


def random_parameter(entry: dict[str, Any]) -> np.ndarray:
    """Values that keep activations finite, the same ones for the same name."""
    dtype, name = entry["dtype"], entry["name"]
    # mlc_llm leaves the vocabulary's size open, under this name.
    shape = [LLAMA_1B["vocab_size"] if size == "vocab_size" else size for size in entry["shape"]]
    rng = np.random.default_rng(list(name.encode()))
    if dtype in ("int32", "uint32"):
        bits = rng.integers(0, 256, (*shape, 4), dtype=np.uint8)
        return bits.view(dtype).reshape(shape)
    if name.endswith("norm.weight"):
        return np.ones(shape, dtype)
    spread = 0.02 if name.endswith("scales") else shape[-1] ** -0.5
    flat = np.empty(prod(shape), dtype)
    for start in range(0, flat.size, 2**24):  # float32 randoms of all of it would double the peak
        part = flat[start : start + 2**24]
        part[...] = rng.random(part.size, np.float32) * spread * 0.1
    return flat.reshape(shape)


class Model:
    """A library, random parameters, one KV cache with one sequence of `capacity` tokens at most."""

    def __init__(self, library: Path, capacity: int) -> None:
        self.vm = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        self.metadata = json.loads(self.vm["_metadata"]())
        self.params = [
            tvm.runtime.tensor(random_parameter(entry)) for entry in self.metadata["params"]
        ]
        sizes = (1, capacity, self.metadata["prefill_chunk_size"], 16, 0)
        self.cache = self.vm["create_tir_paged_kv_cache"](*(Shape([size]) for size in sizes))
        self.call = tvm.get_global_func

    def restart(self) -> None:
        self.call("vm.builtin.kv_state_clear")(self.cache)
        self.call("vm.builtin.kv_state_add_sequence")(self.cache, 0)

    def forward(self, name: str, ids: np.ndarray) -> np.ndarray:
        self.call("vm.builtin.kv_state_begin_forward")(self.cache, Shape([0]), Shape([len(ids)]))
        embeds = self.vm["embed"](tvm.runtime.tensor(ids.astype(np.int32)), self.params)
        embeds = self.call("vm.builtin.reshape")(embeds, Shape([1, *embeds.shape]))
        logits = self.vm[name](embeds, self.cache, self.params)[0].numpy()
        self.call("vm.builtin.kv_state_end_forward")(self.cache)
        return logits
