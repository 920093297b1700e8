"""A compiled library at work: TVM's virtual machine, the weights, and one paged KV cache.

Everything is driven through the functions that MLC's libraries export and through TVM's
`vm.builtin.kv_state_*`; only TVM's runtime is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from mlcawq.engine.artifact import BuiltFolder, check_library
from mlcawq.engine.cpu_library import check_processor
from mlcawq.engine.devices import Device, choose_device, fitting_device
from mlcawq.engine.threads import choose_threads, use_threads
from mlcawq.engine.weights import check_placement, load_weights
from mlcawq.errors import UserError

PAGE_SIZE = 16  # tokens; the value that the kernels of the paged cache are generated for
_POOLED_ALLOCATOR = 2
# Of the free memory, for the KV cache at most; a GPU's own memory is nobody else's.
_MEMORY_SHARE = 0.6
_CUDA_MEMORY_SHARE = 0.85
_CUDA_CACHE_BYTES = 2**27  # that TVM's cache takes beside its pages, for what it tells attention
_KV_FUNCTIONS = {
    "kv_state_": (
        "clear",
        "add_sequence",
        "remove_sequence",
        "fork_sequence",
        "popn",
        "begin_forward",
        "end_forward",
    ),
    "attention_kv_cache_": ("get_num_available_pages",),
}
_MOST_SHAPES = 1024  # of TVM's objects that are kept
_DTYPE_BYTES = {"float16": 2, "float32": 4}


class ModelRuntime:
    """One model on one device.

    max_batch: sequences in one forward pass. max_total_tokens: tokens in the KV cache, of all
    sequences together; fewer when the device's memory does not allow for them.
    threads and weights: on a CPU, see `mlcawq.engine.threads` and `mlcawq.engine.weights`.

    Raises UserError when the device or the library is missing or does not fit the folder.
    """

    def __init__(
        self,
        built: BuiltFolder,
        device: str = "auto",
        *,
        max_batch: int | None = None,
        max_total_tokens: int | None = None,
        threads: int | None = None,
        weights: str = "auto",
    ) -> None:
        placement = check_placement(weights)
        self.device, self.library = choose_device(built, device)
        self.threads = choose_threads(threads)
        self._vm = _load_library(self.library, self.device)
        self.metadata: dict[str, Any] = json.loads(str(self._vm["_metadata"]()))
        fitting = fitting_device(built, self.device, device, self.metadata)
        if fitting != self.device:
            self.device, self._vm = fitting, _load_library(self.library, fitting)
        check_library(built, self.metadata, self.library)
        self.vocab_size = built.vocab_size
        self.prefill_chunk_size = min(
            int(self.metadata["prefill_chunk_size"]), self._rows_of_activations(built)
        )
        limit = int(self.metadata.get("max_batch_size", 1))
        self.max_batch = limit if max_batch is None else min(max_batch, limit)
        self._functions = {
            name: self._function(name)
            for name in ("embed", "prefill", "decode", "batch_prefill", "batch_decode")
        }
        self._verify = self._function("batch_verify", required=False)
        prepare = self._function("cuda_graph_alloc_init", required=False)
        if prepare is not None:
            prepare()
        self._kv = {
            name: tvm.get_global_func(f"vm.builtin.{prefix}{name}")
            for prefix, names in _KV_FUNCTIONS.items()
            for name in names
        }
        self._reshape = tvm.get_global_func("vm.builtin.reshape")
        self._item = tvm.get_global_func("ffi.ArrayGetItem")  # a third of what [] takes
        self._ids: dict[int, Any] = {}
        self._shapes: dict[tuple[int, ...], Any] = {}
        self._width: int | None = None  # of an embedding
        names = [param["name"] for param in self.metadata["params"]]
        self._weight_bytes = sum(t.nbytes for shard in built.shards for t in shard.tensors)
        with self._out_of_memory("the weights are loaded", "choose another --device"):
            loaded = load_weights(built.shards, names, self.device.tvm, placement, self.threads)
        self._params, self._move = tvm_ffi.convert(loaded.tensors), loaded.move
        self._moved: Future[list[Any]] | None = None
        self.weights = "resident" if placement == "resident" else "mapped"
        smaller = "free memory, or build with a smaller --context-window-size"
        with self._out_of_memory("the KV cache is allocated", smaller):
            self._cache = self._create_cache(self._cache_tokens(built, max_total_tokens))
        self.total_pages = self.available_pages()

    # ------------------------------------------------------------------------------ KV cache

    @property
    def capacity(self) -> int:
        """Tokens that a single sequence can have in the cache."""
        return self.total_pages * PAGE_SIZE

    def available_pages(self) -> int:
        return int(self._kv["get_num_available_pages"](self._cache))

    def add_sequence(self, sequence: int) -> None:
        self._kv["add_sequence"](self._cache, sequence)

    def remove_sequence(self, sequence: int) -> None:
        self._kv["remove_sequence"](self._cache, sequence)

    def fork_sequence(self, parent: int, child: int, position: int) -> None:
        """A new sequence that shares the parent's first `position` tokens."""
        self._kv["fork_sequence"](self._cache, parent, child, position)

    def pop(self, sequence: int, count: int) -> None:
        """Forget the last `count` tokens of a sequence."""
        self._kv["popn"](self._cache, sequence, count)

    def clear(self) -> None:
        """Forget all sequences."""
        self._kv["clear"](self._cache)

    # ------------------------------------------------------------------------------- forward

    def prefill(self, parts: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
        """Append tokens to sequences: (sequence, ids), at most prefill_chunk_size ids in all.

        Returns the logits after each sequence's last token, float32 [len(parts), V].
        """
        sequences = [sequence for sequence, _ in parts]
        lengths = [len(ids) for _, ids in parts]
        embedded = self._embed([token for _, ids in parts for token in ids], batch_first=True)
        if len(parts) == 1:
            return self._forward(sequences, lengths, "prefill", embedded).reshape(1, -1)
        last = np.cumsum(lengths, dtype=np.int32) - 1
        positions = self._tensor(last.astype(np.int32))
        logits = self._forward(sequences, lengths, "batch_prefill", embedded, positions)
        return logits.reshape(len(parts), -1)

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each sequence. Returns logits float32 [len(sequences), V]."""
        if self._move is not None:  # now that the first token is out, and others are wanted
            self._moved, self._move = self._move(), None
        embedded = self._embed(tokens, batch_first=False)
        name = "decode" if len(sequences) == 1 else "batch_decode"
        logits = self._forward(sequences, [1] * len(sequences), name, embedded)
        return logits.reshape(len(sequences), -1)

    def score(self, sequence: int, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens to one sequence. Returns the logits after each, float32 [n, V].

        n is at most `score_chunk`.
        """
        if self._verify is None:
            return self.prefill([(sequence, tokens)])
        embedded = self._embed(tokens, batch_first=True)
        logits = self._forward([sequence], [len(tokens)], "batch_verify", embedded)
        # TVM keeps what it has allocated, and this may be much, and be kept for long.
        return logits.reshape(len(tokens), -1).copy()

    @property
    def score_chunk(self) -> int:
        """Tokens that `score` takes at most; for libraries without `batch_verify`, one."""
        if self._verify is None:
            return 1
        return min(self.prefill_chunk_size, self._rows_in_binding(self.vocab_size, 4))

    def _forward(
        self, sequences: Sequence[int], lengths: Sequence[int], name: str, *inputs: Any
    ) -> np.ndarray:
        function = self._verify if name == "batch_verify" else self._functions[name]
        self._kv["begin_forward"](self._cache, self._shape(sequences), self._shape(lengths))
        result = function(*inputs, self._cache, self._params)
        self._kv["end_forward"](self._cache)
        return np.asarray(self._on_host(self._item(result, 0)), np.float32)

    def _embed(self, tokens: Sequence[int], *, batch_first: bool) -> Any:
        """Embeddings as [1, n, hidden] for prefill or [n, 1, hidden] for decode: what every pass
        begins with.
        """
        if self.device.kind == "cpu":
            use_threads(self.threads)  # here: each pass may be called from another thread
            self._take_over_moved()
        hidden = self._functions["embed"](self._token_ids(tokens), self._params)
        if self._width is None:
            self._width = int(hidden.shape[-1])
        n = len(tokens)
        shape = (1, n, self._width) if batch_first else (n, 1, self._width)
        return self._reshape(hidden, self._shape(shape))

    def _take_over_moved(self) -> None:
        """From here on use the weights that were moved behind the passes before, if they are
        there; the same bytes. Where they could not be moved the mapped ones stay.
        """
        if self._moved is not None and self._moved.done():
            if self._moved.exception() is None:
                self._params, self.weights = tvm_ffi.convert(self._moved.result()), "resident"
            self._moved = None

    def _token_ids(self, tokens: Sequence[int]) -> Any:
        """On the device. As many as are decoded at once go where the last ones of that number were:
        allocating makes a GPU wait.
        """
        n = len(tokens)
        if n > self.max_batch:
            return self._tensor(np.array(tokens, np.int32))
        if n not in self._ids:
            self._ids[n] = self._tensor(np.array(tokens, np.int32))
        elif self.device.kind == "cpu":
            np.from_dlpack(self._ids[n])[:] = tokens
        else:
            self._ids[n].copyfrom(np.array(tokens, np.int32))
        return self._ids[n]

    def _tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, device=self.device.tvm)

    def _on_host(self, tensor: Any) -> np.ndarray:
        """A tensor that nobody else has: on a CPU its own memory, which the array keeps alive.

        Logits are half a megabyte, and copying them took 2 % of a small model's token.
        """
        return np.from_dlpack(tensor) if self.device.kind == "cpu" else tensor.numpy()

    def _shape(self, sizes: Sequence[int]) -> Any:
        """TVM's object for them; those that every token needs are made once."""
        key = tuple(sizes)
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = tvm_ffi.Shape(key)
        return self._shapes[key]

    # ------------------------------------------------------------------------------- loading

    def _function(self, name: str, *, required: bool = True) -> Any:
        function = self._vm.get_function(name) if self._vm.implements_function(name) else None
        if function is None and required:
            raise UserError.one(
                f"the library has no function {name!r}",
                str(self.library),
                "compile the folder again with `mlcawq compile`",
            )
        return function

    @contextmanager
    def _out_of_memory(self, what: str, fix: str) -> Iterator[None]:
        """A device that has no room left is no bug of ours: `what` was going on, in the present."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
                raise
            message = f"{self.device.name} runs out of memory while {what}"
            raise UserError.one(message, str(self.library.parent), fix) from error

    def _rows_in_binding(self, width: int, element_bytes: int) -> int:
        """Rows of a tensor that a kernel of this device can be handed at once, one at least."""
        if self.device.binding_bytes is None:
            return 2**31
        return max(self.device.binding_bytes // (width * element_bytes), 1)

    def _rows_of_activations(self, built: BuiltFolder) -> int:
        """Tokens whose widest activations, those of gate and up, a kernel can be handed."""
        model = built.config.get("model_config") or {}
        width = 2 * int(model.get("intermediate_size") or 0)
        dtype = _activation_dtype(self.metadata)
        return self._rows_in_binding(max(width, 1), _DTYPE_BYTES[dtype])

    def _create_cache(self, tokens: int) -> Any:
        create = self._function("create_tir_paged_kv_cache")
        sliding_window = 0
        sizes = (self.max_batch, tokens, self.prefill_chunk_size, PAGE_SIZE, sliding_window)
        return create(*(tvm_ffi.Shape([value]) for value in sizes))

    def _cache_tokens(self, built: BuiltFolder, asked: int | None) -> int:
        """Room for max_batch full contexts, or for what fits into memory.

        asked: an explicit number, which only what a kernel can address limits.
        """
        wanted = asked or int(built.config["context_window_size"]) * self.max_batch
        cache = self.metadata.get("kv_cache")
        if not cache:
            return wanted
        # Most libraries keep keys and values in the type of their activations.
        slot = int(cache["head_dim"]) * _DTYPE_BYTES[_activation_dtype(self.metadata)]
        slot = int(cache.get("slot_bytes", slot))
        per_layer = 2 * int(cache["num_key_value_heads"]) * slot
        per_token = per_layer * int(cache["num_hidden_layers"])
        if self.device.binding_bytes is not None:
            # The pages of a layer are one tensor, with a page more than the tokens fill.
            most = (self.device.binding_bytes // (per_layer * PAGE_SIZE) - 1) * PAGE_SIZE
            self._require_a_chunk(most, f"{per_layer} bytes a token in each layer", built)
            wanted = min(wanted, most)
        if asked:
            return wanted
        free, share = self.device.free_memory(self._weight_bytes), _MEMORY_SHARE
        if self.device.kind == "cuda":
            free, share = free - _CUDA_CACHE_BYTES, _CUDA_MEMORY_SHARE
        if self.device.kind == "cpu" and self.weights == "mapped":
            free -= self._weight_bytes  # the system's to take back, but wanted for every token
        fitting = int(free * share) // per_token
        self._require_a_chunk(fitting, f"{per_token} bytes a token", built)
        return min(wanted, fitting)

    def _require_a_chunk(self, tokens: int, need: str, built: BuiltFolder) -> None:
        if tokens < self.prefill_chunk_size:
            raise UserError.one(
                f"the KV cache needs {need}, and {self.device.name} has room for {max(tokens, 0)} "
                f"tokens only, fewer than the {self.prefill_chunk_size} of a prefill chunk",
                str(built.path),
                "free memory, or build with a smaller --prefill-chunk-size",
            )


def _activation_dtype(metadata: dict[str, Any]) -> str:
    """What a library's activations and KV cache are, by the name of its quantization."""
    return "float32" if "f32" in str(metadata["quantization"]) else "float16"


def _load_library(path: Path, device: Device) -> Any:
    check_processor(path)
    try:
        vm = tvm.runtime.load_module(str(path))["vm_load_executable"]()
        init: list[int] = []
        for dev in (device.tvm, tvm.cpu(0)):
            init += [dev.dlpack_device_type(), dev.index, _POOLED_ALLOCATOR]
        vm["vm_initialization"](*(init if device.kind != "cpu" else init[:3]))
    except Exception as error:  # whatever the loader of shared objects says
        raise UserError.one(
            f"the library cannot be loaded: {next(iter(str(error).strip().splitlines()), '')}",
            str(path),
            "compile it again on this machine, with the TVM that is installed here",
        ) from error
    return vm
