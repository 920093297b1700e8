"""llama.cpp through the C functions that llama-cpp-python wraps, without its Python on the way.

Runs in the environment of scripts/peers/setup_llamacpp.sh.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

_MICRO_BATCH = 512  # llama.cpp's own default
# What llama.cpp has regrouped kernels for; the other types stay as the file has them.
_REPACKED = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K)


class LlamaCppModel:
    """file: GGUF. weights: how llama.cpp keeps them:

    "default" is llama.cpp's own choice, AMX tiles where the processor has AMX; "repack" rows
    interleaved for the widest vectors; "plain" as the file has them. mmap: whether the file is
    mapped. flash: whether attention is llama.cpp's flash attention.
    """

    def __init__(
        self, file: str, threads: int, capacity: int, weights: str, mmap: bool, flash: bool
    ) -> None:
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = weights != "plain"
        if weights == "repack":
            self._overrides = _repacked(file)  # llama.cpp keeps no copy
            params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = lib.llama_model_load_from_file(file.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        context = lib.llama_context_default_params()
        context.n_ctx = capacity
        context.n_batch = context.n_ubatch = _MICRO_BATCH
        context.n_seq_max = context.n_outputs_max = 1
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = int(flash)
        self._context = lib.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._memory = lib.llama_get_memory(self._context)

    def forget(self, kept: int, dropped: int) -> None:
        if kept == 0:
            lib.llama_memory_clear(self._memory, False)
        elif dropped:
            lib.llama_memory_seq_rm(self._memory, 0, kept, -1)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        for start in range(0, len(ids), _MICRO_BATCH):
            logits = self._forward(np.ascontiguousarray(ids[start : start + _MICRO_BATCH]))
        return logits

    def decode(self, token: int) -> np.ndarray:
        return self._forward(np.array([token], np.int32))

    def _forward(self, ids: np.ndarray) -> np.ndarray:
        # Such a batch asks for the logits of its last token alone.
        batch = lib.llama_batch_get_one(
            ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids)
        )
        status = lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode answers {status}")
        logits = lib.llama_get_logits_ith(self._context, -1)  # waits until they are computed
        return np.ctypeslib.as_array(logits, (self._vocabulary,))

    def facts(self) -> dict[str, Any]:
        return {"system": lib.llama_print_system_info().decode().strip()}


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("kind", ctypes.c_void_p))


def _repacked(file: str) -> Any:
    """An override that keeps AMX from the tensors that rows can be interleaved of."""
    kind = _buffer_type("CPU_REPACK")
    names = [
        re.escape(tensor.name)
        for tensor in GGUFReader(file).tensors
        if tensor.tensor_type in _REPACKED and tensor.name.startswith("blk.")
    ]
    pattern = "^(" + "|".join(names) + ")$"
    return (_Override * 2)(_Override(pattern.encode(), kind), _Override(None, None))


def _buffer_type(name: str) -> int:
    """ggml's handle of one of the CPU's buffer types."""
    ggml = ctypes.CDLL(lib._lib._name)  # the libraries that it is linked with are searched too
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    prototypes: dict[str, tuple[Any, ...]] = {
        "ggml_backend_dev_by_type": (pointer, ctypes.c_int),
        "ggml_backend_dev_backend_reg": (pointer, pointer),
        "ggml_backend_reg_get_proc_address": (pointer, pointer, text),
        "ggml_backend_buft_name": (text, pointer),
    }
    for function, (result, *arguments) in prototypes.items():
        getattr(ggml, function).restype = result
        getattr(ggml, function).argtypes = arguments
    device = ggml.ggml_backend_dev_by_type(0)  # the CPU
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
    found: list[str] = []
    while kinds and kinds[len(found)]:
        kind = kinds[len(found)]
        found.append(ggml.ggml_backend_buft_name(kind).decode())
        if found[-1] == name:
            return int(kind)
    raise RuntimeError(f"this llama.cpp has no {name}, only {', '.join(found) or 'plain buffers'}")
