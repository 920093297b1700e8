#!/usr/bin/env python
"""Decode and prefill speed at the shape of a 1B llama (Llama 3.2 1B), with random weights.

    python scripts/bench_decode.py [--quantization q4f16_autoawq] [--tokens 64] [--prefill 512]

Prints tokens per second, and beside the decode speed its floor: the time that this machine takes
just to read the bytes of one token, measured in the same run with as many threads. Needs about
1.5 GB of memory for 4-bit weights, 3.5 GB for float16. TVM_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm_ffi import Shape

from mlcawq.build.compile import compile_model
from mlcawq.checkpoint.config import ModelConfig, parse_config

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
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
    "torch_dtype": "float16",
}
GROUP_SIZES = {"q4f16_autoawq": 128, "q4f16_autoawq_g64": 64, "q4f16_autoawq_g32": 32}


def model_config(quantization: str, layers: int) -> ModelConfig:
    raw = {**LLAMA_1B, "num_hidden_layers": layers}
    if quantization in GROUP_SIZES:
        raw["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZES[quantization],
            "zero_point": True,
            "version": "gemm",
        }
    return parse_config(raw)


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
    """A library, random parameters, one KV cache with one sequence."""

    def __init__(self, library: Path, capacity: int) -> None:
        self.vm = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        self.metadata = json.loads(self.vm["_metadata"]())
        self.params, self.bytes_read = [], 0
        for entry in self.metadata["params"]:
            array = random_parameter(entry)
            # Every byte is read for every token: the embedding is the head as well.
            self.bytes_read += array.nbytes
            self.params.append(tvm.runtime.tensor(array))
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


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together, from memory that no cache holds."""
    data = np.ones(2**27, np.float32)  # 512 MB
    parts = np.array_split(data, threads)

    def read(part: np.ndarray) -> float:
        return float(np.add.reduce(part))

    with ThreadPoolExecutor(threads) as pool:
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quantization", default="q4f16_autoawq")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache before")
    parser.add_argument("--prefill", type=int, default=512, help="tokens prefilled at once")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    threads = int(os.environ.get("TVM_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    config = model_config(arguments.quantization, arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        library = compile_model(
            config,
            Path(folder) / "lib.so",
            arguments.target,
            arguments.quantization,
            context_window_size=arguments.context + arguments.tokens + arguments.prefill,
            prefill_chunk_size=max(arguments.prefill, arguments.context),
            max_batch_size=1,
        )
        compile_seconds = time.perf_counter() - start
        model = Model(library.path, arguments.context + arguments.tokens + arguments.prefill + 16)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, max(arguments.prefill, arguments.context))

    prefill_seconds = float("inf")
    for _ in range(3):
        model.restart()
        start = time.perf_counter()
        model.forward("prefill", ids[: arguments.prefill])
        prefill_seconds = min(prefill_seconds, time.perf_counter() - start)

    model.restart()
    logits = model.forward("prefill", ids[: arguments.context])
    steps = []
    for _ in range(arguments.tokens):
        token = np.array([logits.argmax()])
        start = time.perf_counter()
        logits = model.forward("decode", token)
        steps.append(time.perf_counter() - start)
    step = float(np.median(steps))
    bandwidth = read_bandwidth(threads)
    floor = model.bytes_read / bandwidth
    result = {
        "quantization": arguments.quantization,
        "target": library.target,
        "threads": threads,
        "compile_seconds": round(compile_seconds, 1),
        "decode_tokens_per_second": round(1 / step, 2),
        "prefill_tokens_per_second": round(arguments.prefill / prefill_seconds, 1),
        "bytes_per_token": model.bytes_read,
        "read_bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "decode_share_of_memory_floor": round(floor / step, 3),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:32} {value}")


if __name__ == "__main__":
    main()
