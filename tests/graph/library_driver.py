"""Runs a compiled library directly through its functions, as an engine would, and nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm_ffi import Shape


def _function(name: str) -> Any:
    return tvm.get_global_func(name)


class LibraryDriver:
    """A library, a file or an executable in memory, with its parameters loaded from `folder`, and
    one KV cache, on `device`.
    """

    def __init__(
        self, library: Any, folder: Path, capacity: int = 1024, device: Any = None
    ) -> None:
        self.device = device = device or tvm.cpu()
        if isinstance(library, Path):
            library = tvm.runtime.load_module(str(library))
        self.vm = tvm.relax.VirtualMachine(library, device)
        self.metadata = json.loads(self.vm["_metadata"]())
        _function("vm.builtin.tensor_cache.load")(str(folder), device.dlpack_device_type(), 0)
        names = [parameter["name"] for parameter in self.metadata["params"]]
        self.params = _function("vm.builtin.param_array_from_cache_by_name")(names)
        _function("vm.builtin.tensor_cache.clear")()
        for parameter, value in zip(self.metadata["params"], self.params, strict=True):
            for size, wanted in zip(value.shape, parameter["shape"], strict=True):
                assert isinstance(wanted, str) or size == wanted  # a name: mlc_llm's vocabulary
            assert str(value.dtype) == parameter["dtype"]
        self.cache = self.vm["create_tir_paged_kv_cache"](
            Shape([self.metadata["max_batch_size"]]),
            Shape([capacity]),
            Shape([self.metadata["prefill_chunk_size"]]),
            Shape([16]),
            Shape([0]),
        )

    def add(self, sequence: int) -> None:
        _function("vm.builtin.kv_state_add_sequence")(self.cache, sequence)

    def remove(self, sequence: int) -> None:
        _function("vm.builtin.kv_state_remove_sequence")(self.cache, sequence)

    def fork(self, parent: int, child: int, position: int) -> None:
        _function("vm.builtin.kv_state_fork_sequence")(self.cache, parent, child, position)

    def popn(self, sequence: int, count: int) -> None:
        _function("vm.builtin.kv_state_popn")(self.cache, sequence, count)

    def _forward(self, name: str, ids: list[int], lengths: dict[int, int], *middle: Any) -> Any:
        _function("vm.builtin.kv_state_begin_forward")(
            self.cache, Shape(list(lengths)), Shape(list(lengths.values()))
        )
        embeds = self.embed(ids)
        shape = (len(ids), 1, embeds.shape[1]) if "decode" in name else (1, *embeds.shape)
        embeds = _function("vm.builtin.reshape")(embeds, Shape(shape))
        out = self.vm[name](embeds, *middle, self.cache, self.params)
        _function("vm.builtin.kv_state_end_forward")(self.cache)
        return out[0].numpy()

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self.device)

    def embed(self, ids: list[int]) -> Any:
        return self.vm["embed"](self.tensor(np.array(ids, np.int32)), self.params)

    def prefill(self, sequence: int, ids: list[int]) -> np.ndarray:
        """The logits [vocabulary] after `ids`, as one chunk."""
        return self._forward("prefill", ids, {sequence: len(ids)})[0, 0]

    def decode(self, sequence: int, token: int) -> np.ndarray:
        """The logits [vocabulary] after one more token."""
        return self._forward("decode", [token], {sequence: 1})[0, 0]

    def batch_prefill(self, chunks: dict[int, list[int]]) -> np.ndarray:
        """The last logits [sequences, vocabulary] of a chunk each, in one call."""
        ids = [token for chunk in chunks.values() for token in chunk]
        lengths = {sequence: len(chunk) for sequence, chunk in chunks.items()}
        last = np.cumsum(list(lengths.values())).astype(np.int32) - 1
        return self._forward("batch_prefill", ids, lengths, self.tensor(last))[0]

    def batch_decode(self, tokens: dict[int, int]) -> np.ndarray:
        """The logits [sequences, vocabulary] after one more token each."""
        return self._forward("batch_decode", list(tokens.values()), dict.fromkeys(tokens, 1))[:, 0]

    def batch_verify(self, sequence: int, ids: list[int]) -> np.ndarray:
        """The logits [len(ids), vocabulary] at every position of a chunk."""
        return self._forward("batch_verify", ids, {sequence: len(ids)})[0]
