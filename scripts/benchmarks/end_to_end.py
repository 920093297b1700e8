"""Decoding with a model of Llama-3-8B's shape, against the sum of the kernels that it launches."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import tvm_ffi

from benchmarks.prebuilt import Prebuilt

LIBRARY = "model"
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
}
CONTEXT = 512  # tokens in the cache before the first that is timed
_CHUNK = 512
_STEPS = 64
_PROFILED = 8
SIZES = {"context_window_size": 2048, "prefill_chunk_size": _CHUNK, "max_batch_size": 1}
_PAGE = 16
_POOLED = 2  # TVM's allocator that keeps what it frees


@dataclass(frozen=True)
class Decoding:
    """step: median seconds from a token to the next, its logits on the host. kernels: seconds that
    the GPU computes in it.
    """

    step: float
    kernels: float

    @property
    def overhead(self) -> float:
        return self.step / self.kernels - 1


class Model:
    """The prepared model with random weights on the GPU."""

    def __init__(self, prebuilt: Prebuilt) -> None:
        device = tvm_ffi.device("cuda", 0)
        load = prebuilt.module(LIBRARY).get_function("vm_load_executable")
        self._vm = load()
        gpu, host = device.dlpack_device_type(), tvm_ffi.device("cpu", 0).dlpack_device_type()
        self._call("vm_initialization", gpu, 0, _POOLED, host, 0, _POOLED)
        self.metadata = json.loads(str(self._call("_metadata")))
        self._random = torch.Generator("cuda").manual_seed(0)
        self._kept = [self._parameter(entry) for entry in self.metadata["params"]]
        self._params = tvm_ffi.convert([tvm_ffi.from_dlpack(tensor) for tensor in self._kept])
        self._call("cuda_graph_alloc_init")
        sizes = (1, SIZES["context_window_size"], _CHUNK, _PAGE, 0)
        shapes = (tvm_ffi.Shape([size]) for size in sizes)
        self._cache = self._call("create_tir_paged_kv_cache", *shapes)
        _builtin("kv_state_add_sequence")(self._cache, 0)

    def forward(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens to the one sequence. Returns the last one's logits, on the GPU."""
        _builtin("kv_state_begin_forward")(
            self._cache, tvm_ffi.Shape([0]), tvm_ffi.Shape([tokens.shape[0]])
        )
        hidden = self._call("embed", tvm_ffi.from_dlpack(tokens), self._params)
        hidden = _builtin("reshape")(hidden, tvm_ffi.Shape([1, *hidden.shape]))
        logits = self._call(name, hidden, self._cache, self._params)[0]
        _builtin("kv_state_end_forward")(self._cache)
        return torch.from_dlpack(logits)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._vm.get_function(name)(*arguments)

    def _parameter(self, entry: dict[str, Any]) -> torch.Tensor:
        """Values that keep activations finite and different from zero."""
        shape, name = entry["shape"], entry["name"]
        if entry["dtype"] == "int32":
            bits = torch.iinfo(torch.int32)
            return torch.randint(
                bits.min, bits.max, shape, generator=self._random, device="cuda", dtype=torch.int32
            )
        if "norm" in name:
            return torch.ones(shape, dtype=torch.float16, device="cuda")
        values = torch.rand(shape, generator=self._random, device="cuda", dtype=torch.float16)
        return (values - 0.5) * 0.1 if name.endswith(".weight") else (values + 0.5) * 0.002


def measure_decoding(prebuilt: Prebuilt) -> Decoding:
    """Seconds a token at a context of `CONTEXT`, one sequence."""
    model = Model(prebuilt)
    vocabulary = LLAMA_8B["vocab_size"]
    prompt = torch.randint(0, vocabulary, (CONTEXT,), dtype=torch.int32, device="cuda")
    token = _next(model.forward("prefill", prompt))

    def step() -> None:
        nonlocal token
        token = _next(model.forward("decode", token))

    for _ in range(_PROFILED):  # the first captures the graphs
        step()
    times = []
    for _ in range(_STEPS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize()
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return Decoding(median(times), microseconds / 1e6 / _PROFILED)


def _next(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token, found on the host as an engine does."""
    flat = logits.reshape(-1).cpu()
    if not bool(torch.isfinite(flat).all()):
        raise ArithmeticError("the model computes logits that are not finite")
    return torch.tensor([int(flat.argmax())], dtype=torch.int32, device="cuda")


def _builtin(name: str) -> Any:
    return tvm_ffi.get_global_func(f"vm.builtin.{name}")
